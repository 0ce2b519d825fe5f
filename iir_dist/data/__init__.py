"""Images, ground truth and where they come from."""

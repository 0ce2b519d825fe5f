"""Training: collectives, one loop that knows no Ray, and its launch on Ray Train."""

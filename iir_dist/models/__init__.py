"""Networks that turn an image into a unit vector."""

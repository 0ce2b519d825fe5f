"""Re-ranking of the first candidates of a list by the vectors of all of them."""

"""This rank among the others: its numbers, the store and mesh they share, and failures that all learn of."""

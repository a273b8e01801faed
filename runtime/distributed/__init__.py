"""This rank among the others: its place, the store and mesh it shares with them, and how a failure reaches all."""

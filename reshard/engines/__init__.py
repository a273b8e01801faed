"""Rank files of the engine that one serves with: its own loader is traced, and what it does becomes regions.

A copy plan says where the engine puts every element of a checkpoint. It is made by a planner, a script that runs in the
engine's environment, and it is read here as data that nobody vouches for. Nothing here imports torch.
"""

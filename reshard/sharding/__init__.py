"""The elements of a tensor that each rank holds: placements, regions and their inverse.

Integers only. Nothing here imports torch, opens a file or knows the name of a model.
"""

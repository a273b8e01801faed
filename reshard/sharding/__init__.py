"""Which elements of a tensor are where: placements, regions and their inverse.

Integers only. Nothing here imports torch, opens a file or knows a name of a model.
"""

"""A checkpoint as people publish it: where its weights are, what goes along beside them, and which model class it is.

How tensors are cut is decided in `planning`.
"""

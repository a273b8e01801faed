"""The execution of a plan: regions are read, written and digested by blocks, in a staged folder that appears at once.

There is one executor. `planning` decides what is to be moved.
"""

"""Carries out a plan: regions are read, written and digested block by block, in a staged folder that appears at once.

There is one executor. What is to be moved is decided in `planning`.
"""

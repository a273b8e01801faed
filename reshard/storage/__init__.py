"""Storage: this machine's disk, the Hub and object stores, and how bytes get there and back.

This package knows files, not tensors: other packages decide what is in a file.
"""

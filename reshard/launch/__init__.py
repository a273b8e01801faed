"""The part of the commands on ranks that comes before the ranks: options, checks of them, and the launcher.

Both command lines use it, `reshard` and `reshard-rank`. Importing it does not import torch.
"""

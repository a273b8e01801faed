"""What runs on ranks, seen from before they start: options, what can be checked of them, and the launcher.

Both command lines stand on it, that of `reshard` and that of a rank. Importing it costs no torch.
"""

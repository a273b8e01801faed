"""Where folders are, and how bytes get there and back: this machine's disk, the Hub, object stores.

It knows of files, not of tensors: what is in them is decided above.
"""

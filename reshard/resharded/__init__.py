"""A resharded folder: its manifest and rank files, as they are written and as they are read back.

The format on disk is decided here; `reshard/resharded/README.md` describes it.
"""

"""One file and its bytes: headers read strictly, mappings that survive a cut, digests, data that nobody vouches for.

Code that concerns a single file, whoever wrote it, belongs here. Nothing here knows what a model or a rank is.
"""

"""One file at a time: read strictly, mapped safely, digested, and never trusted. Nothing here knows what a model is."""

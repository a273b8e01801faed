"""The conversion of a checkpoint, whole or in parts, and the finishing of one that was made in parts."""

"""The commands of a rank, one a file."""

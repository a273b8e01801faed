"""`verify`: every byte of a resharded folder against its manifest, and every element against its source."""

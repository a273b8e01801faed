"""From a resharded folder to a model on this rank: found, read, built, and agreed on with the other ranks."""

"""Loading a resharded folder: find it, read this rank's file, build the model, agree with the other ranks."""

"""A loaded model: its parameters and collectives, what it refuses, and its way back to a checkpoint."""

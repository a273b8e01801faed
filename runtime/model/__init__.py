"""A loaded model: its parameters and collectives, what it stays, and how it becomes a checkpoint again."""

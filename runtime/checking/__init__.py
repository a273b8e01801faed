"""`check` on a rank: compare the sharded model with the single-process model, and find where they first differ."""

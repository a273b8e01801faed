"""`check`: whether the sharded model computes what the single-process model does, and where it first does not."""

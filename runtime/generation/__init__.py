"""Text from prompts, with the same tokens on every rank."""

"""Generation of text from prompts, with the same tokens on every rank."""

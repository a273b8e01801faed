"""Results as people read them: tables and texts, made of names, numbers, lists and dicts."""

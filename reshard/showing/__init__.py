"""Results as people read them: tables, texts, pages and pictures, made of names, numbers, lists and dicts."""

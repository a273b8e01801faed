"""Results as people read them: tables and texts. Takes names, numbers, lists and dicts; knows no plan and no file."""

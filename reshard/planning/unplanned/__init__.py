"""Plans for models, or parts of models, that transformers has no plan for."""

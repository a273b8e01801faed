"""Outputs on which a model with a split sequence is compared."""

from __future__ import annotations

from typing import Any

import torch

NEW_TOKENS = 4


GENERATED = 12  # tokens of a prompt that is continued: shorter ones would take time, and show nothing more


def outputs(model: Any, arguments: dict[str, torch.Tensor]) -> dict[str, Any]:
    found = {"logits": model(**arguments).logits, "tokens": None}
    if arguments["input_ids"].shape[1] >= GENERATED:
        found["tokens"] = model.generate(**arguments, max_new_tokens=NEW_TOKENS, do_sample=False).tolist()
    return found

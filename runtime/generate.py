"""Text from a prompt: transformers' own `generate` on the loaded model, on every rank, with equal tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from reshard.errors import BadInputError, printable

from .argmax import argmax_only

__all__ = ["generate_text", "greedy", "load_tokenizer"]


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer copied into a resharded folder. Raises BadInputError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BadInputError(
            f"{printable(folder)}: holds no usable tokenizer", hint=printable(str(error).splitlines()[0])
        ) from None


def greedy(model: Any, ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
    """Token ids `[batch, length]` continued greedily by at most `max_new_tokens`: prompt and continuation."""
    with torch.inference_mode(), argmax_only(model):
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)


def generate_text(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """The prompt and its greedy continuation, as text."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    return tokenizer.decode(greedy(model, ids, max_new_tokens)[0], skip_special_tokens=True)

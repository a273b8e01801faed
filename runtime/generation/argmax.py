"""Greedy decoding without gathered logits: a head that is cut over the vocabulary gives only the argmax."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from reshard.strategies.linear import FEATURE_BOUNDS, ONLY_ARGMAX

__all__ = ["argmax_only", "joins_logits"]

# Fields of a generation config that leave the argmax as it is. Greedy decoding ignores the samplers' fields.
_HARMLESS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "use_cache"),
    *("do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens", "_from_model_config"),
}


def joins_logits(model: Any) -> bool:
    """Whether every rank gathers the logits from the ranks' parts, so that all have the same bits."""
    return hasattr(model.get_output_embeddings(), FEATURE_BOUNDS)


@contextlib.contextmanager
def argmax_only(model: Any) -> Iterator[None]:
    """Within this context, only the argmax of the model's logits is right, if greedy decoding needs no more.

    The first forward still gathers the logits, and shows whether the model returns them just as its head made them. If
    the model or the generation config changes them afterwards, they are gathered every time.
    """
    head = model.get_output_embeddings()
    said = {name for name, value in model.generation_config.to_diff_dict().items() if value not in (None, False)}
    if not joins_logits(model) or not said <= _HARMLESS:
        yield
        return
    gathered: Any = None

    def see(_module: Any, _inputs: Any, output: Any) -> None:
        nonlocal gathered
        gathered = output

    def compare(_module: Any, _inputs: Any, outputs: Any) -> None:
        setattr(head, ONLY_ARGMAX, getattr(outputs, "logits", None) is gathered)
        remove()  # so that a compiled forward has no hooks, and is the same for every call

    def remove() -> None:
        for handle in handles:
            handle.remove()

    handles = [head.register_forward_hook(see), model.register_forward_hook(compare)]
    try:
        yield
    finally:
        remove()
        setattr(head, ONLY_ARGMAX, False)

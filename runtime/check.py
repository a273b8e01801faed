"""Compare a resharded model with the single-process model it was made from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from reshard.architecture import quiet_transformers
from reshard.places import resolve_source

from .generate import greedy

__all__ = ["Parity", "check"]

EXACT = 1e-5  # largest relative error of fp32 logits: sums are split over the ranks and added in another order
ROUNDING = 3  # times the error that one process makes by computing in half precision


@dataclass(frozen=True, slots=True)
class Parity:
    """What the sharded model computes against the single-process one. Relative errors are to its largest value.

    The values are logits, or the last hidden state of a model without a head. `tolerance` is what rounding explains:
    in half precision, a few times the reference's own distance from fp32. `equal_tokens` is None where the model
    generates none.
    """

    max_abs: float
    max_rel: float
    tolerance: float
    equal_tokens: bool | None

    @property
    def ok(self) -> bool:
        """Whether rounding explains the difference. Tokens must be equal too, where the dtype is exact enough."""
        return self.max_rel <= self.tolerance and (self.equal_tokens is not False or self.tolerance > EXACT)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def check(model: Any, reference: str, *, revision: str | None = None, length: int = 16, new_tokens: int = 16) -> Parity:
    """Forward, and greedy decoding where the model can, on `length` fixed token ids, against the single-process model.

    That is `from_pretrained(reference)`, in rank 0's memory. Call it on every rank; all get the same result.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (2, length), generator=generator).to(model.device)
    values, tokens = _values(model, ids), _tokens(model, ids, new_tokens)
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        result = [_compare(model, ids, values, tokens, resolve_source(reference, revision=revision).root, new_tokens)]
    dist.broadcast_object_list(result, src=0, device=model.device)
    return result[0]


def _values(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The model's output in fp32: logits, else hidden states. A decoder of its own is fed the same ids."""
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
    with torch.inference_mode():
        return model(**inputs)[0].float()


def _tokens(model: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor | None:
    return greedy(model, ids, new_tokens) if model.can_generate() else None


def _compare(
    model: Any,
    ids: torch.Tensor,
    values: torch.Tensor,
    tokens: torch.Tensor | None,
    folder: Path,
    new_tokens: int,
) -> Parity:
    with quiet_transformers():
        single = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True).to(model.device).eval()
    expected, wanted = _values(single, ids), _tokens(single, ids, new_tokens)
    scale = expected.abs().max().item() or 1.0
    error = (values - expected).abs().max().item()
    tolerance = EXACT
    if model.dtype in (torch.float16, torch.bfloat16):
        exact = _values(single.float(), ids)
        tolerance = max(EXACT, ROUNDING * (expected - exact).abs().max().item() / scale)
    equal = None if tokens is None or wanted is None else torch.equal(tokens, wanted)
    return Parity(error, error / scale, tolerance, equal)

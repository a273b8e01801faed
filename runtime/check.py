"""Compare a resharded model with the single-process model it was made from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from reshard.architecture import quiet_transformers
from reshard.hub import resolve_source

from .generate import greedy

__all__ = ["TOLERANCES", "Parity", "check"]

# Largest relative error of the logits that rounding explains: sums are split over the ranks and added in another order.
TOLERANCES = {"float32": 1e-5, "float64": 1e-12, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True, slots=True)
class Parity:
    """Logits of the sharded model against the reference. Relative errors are to the largest reference logit."""

    max_abs: float
    max_rel: float
    tolerance: float
    equal_tokens: bool

    @property
    def ok(self) -> bool:
        """Whether rounding explains the difference. Tokens must be equal too, where the dtype is exact enough."""
        return self.max_rel <= self.tolerance and (self.equal_tokens or self.tolerance > 1e-4)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def check(model: Any, reference: str, *, revision: str | None = None, length: int = 16, new_tokens: int = 16) -> Parity:
    """Forward and greedy decoding on `length` fixed token ids, compared with `from_pretrained(reference)` on rank 0.

    Call it on every rank; all get the same result. The reference model lives in rank 0's memory.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (2, length), generator=generator).to(model.device)
    with torch.inference_mode():
        logits = model(ids).logits.float()
    tokens = greedy(model, ids, new_tokens)
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        result = [_compare(model, ids, logits, tokens, resolve_source(reference, revision=revision).root, new_tokens)]
    dist.broadcast_object_list(result, src=0, device=model.device)
    return result[0]


def _compare(
    model: Any, ids: torch.Tensor, logits: torch.Tensor, tokens: torch.Tensor, folder: Path, new_tokens: int
) -> Parity:
    dtype = str(model.dtype).removeprefix("torch.")
    with quiet_transformers():
        single = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True).to(model.device).eval()
    with torch.inference_mode():
        expected = single(ids).logits.float()
    error = (logits - expected).abs().max().item()
    scale = expected.abs().max().item()
    wanted = greedy(single, ids, new_tokens)
    return Parity(error, error / scale if scale else error, TOLERANCES.get(dtype, 1e-5), torch.equal(tokens, wanted))

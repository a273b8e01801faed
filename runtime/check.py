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

__all__ = ["Parity", "check"]

EXACT = 1e-5  # largest relative error of fp32 logits: sums are split over the ranks and added in another order
ROUNDING = 3  # times the error that one process makes by computing in half precision


@dataclass(frozen=True, slots=True)
class Parity:
    """Logits of the sharded model against the single-process one. Relative errors are to its largest logit.

    `tolerance` is what rounding explains: in half precision, a few times the reference's own distance from fp32.
    """

    max_abs: float
    max_rel: float
    tolerance: float
    equal_tokens: bool

    @property
    def ok(self) -> bool:
        """Whether rounding explains the difference. Tokens must be equal too, where the dtype is exact enough."""
        return self.max_rel <= self.tolerance and (self.equal_tokens or self.tolerance > EXACT)

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
    with quiet_transformers():
        single = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True).to(model.device).eval()
    with torch.inference_mode():
        expected = single(ids).logits.float()
    wanted = greedy(single, ids, new_tokens)
    scale = expected.abs().max().item() or 1.0
    error = (logits - expected).abs().max().item()
    tolerance = EXACT
    if model.dtype in (torch.float16, torch.bfloat16):
        with torch.inference_mode():
            exact = single.float()(ids).logits
        tolerance = max(EXACT, ROUNDING * (expected - exact).abs().max().item() / scale)
    return Parity(error, error / scale, tolerance, torch.equal(tokens, wanted))

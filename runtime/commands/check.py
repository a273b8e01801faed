"""The command `check` of a rank."""

from __future__ import annotations

import json
from typing import Any

import click

from reshard.errors import IntegrityError
from reshard.launch.options import check_options

from ..checking.check import check as compare
from ..checking.text import parity_text
from ..model.kernels import sdpa
from ..model.quantized.native import AUTO, DEQUANTISED
from .options import load_model, say

__all__ = ["check"]


@click.command()
@check_options
def check(
    out: str, reference: str | None, per_layer: bool, style: str, kernel: str | None, compute: str, **options: Any
) -> None:
    """Compare logits and greedy tokens with the single-process model. `reshard check` runs this on each rank.

    \b
    Example:
      torchrun --no-python --nproc-per-node 2 reshard-rank check llama-tp2 --reference ./llama
    """
    if reference is None and compute == AUTO:
        compute = DEQUANTISED  # as the stored logits are
    with sdpa(kernel):
        model = load_model(out, kernel=kernel, compute=compute, **options)
        parity = compare(model, reference, per_layer=per_layer)
    say(json.dumps(parity.to_json()) if style == "json" else parity_text(out, parity, per_layer=per_layer))
    if parity.unreached:
        raise IntegrityError(f"{out}: not every parameter of it is that of {reference}")
    if not parity.ok:
        of = reference if reference else "the model that its reference logits are of"
        raise IntegrityError(f"{out}: the sharded model does not compute what {of} does")

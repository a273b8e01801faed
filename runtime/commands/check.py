"""`check`, as a command: what it prints, and on which rank."""

from __future__ import annotations

import json
from typing import Any

import click

from reshard.errors import IntegrityError

from ..check import check as compare
from ..check_text import parity_text
from ..kernels import sdpa
from .options import format_option, load_model, model_options, replicas_option, say, sdpa_option

__all__ = ["check"]


@click.command()
@click.argument("out")
@click.option("--reference", metavar="SOURCE", help="The checkpoint that OUT was made from. [default: stored logits]")
@click.option(
    "--per-layer",
    is_flag=True,
    help="Name the first module that computes something else, and why; where none does, parameters that are altered.",
)
@sdpa_option
@replicas_option
@model_options
@format_option
def check(out: str, reference: str | None, per_layer: bool, style: str, kernel: str | None, **options: Any) -> None:
    """Compare logits and greedy tokens with the single-process model; exit 4 where rounding does not explain them.

    Without --reference, with what `reshard convert --reference-logits` has stored of it: made on CPU, so that on
    another device the limit is looser in fp32.

    The logits show only what the fixed tokens reach: not the other rows of an embedding, nor experts that none is
    routed to. With --per-layer, where no module differs, every parameter is compared, as `reshard verify OUT --against
    SOURCE` does without running anything.

    \b
    Examples:
      torchrun --no-python --nproc-per-node 2 reshard-rank check llama-tp2 --reference ./llama
      torchrun --no-python --nproc-per-node 2 reshard-rank check llama-tp2 --reference ./llama --per-layer --no-digests
    """
    with sdpa(kernel):
        model = load_model(out, kernel=kernel, **options)
        parity = compare(model, reference, per_layer=per_layer)
    say(json.dumps(parity.to_json()) if style == "json" else parity_text(out, parity, per_layer=per_layer))
    if parity.unreached:
        raise IntegrityError(f"{out}: not every parameter of it is that of {reference}")
    if not parity.ok:
        of = reference if reference else "the model that its reference logits are of"
        raise IntegrityError(f"{out}: the sharded model does not compute what {of} does")

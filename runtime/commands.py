"""`check`, as a command: what it prints, and on which rank."""

from __future__ import annotations

import json
from typing import Any

import click

from reshard.errors import IntegrityError

from .check import check as compare
from .options import format_option, load_model, model_options, say

__all__ = ["check"]


@click.command()
@click.argument("out")
@click.option("--reference", required=True, metavar="SOURCE", help="The checkpoint that OUT was made from.")
@model_options
@format_option
def check(out: str, reference: str, style: str, **options: Any) -> None:
    """Compare logits and greedy tokens with the single-process model; exit 4 where rounding does not explain them.

    \b
    Example:
      torchrun --nproc-per-node 2 -m runtime check llama-tp2 --reference ./llama
    """
    model = load_model(out, **options)
    parity = compare(model, reference)
    tokens = {True: "equal", False: "different", None: "not generated"}[parity.equal_tokens]
    text = f"max abs {parity.max_abs:.3g}, max rel {parity.max_rel:.3g} (limit {parity.tolerance:g}), tokens {tokens}"
    say(json.dumps(parity.to_json()) if style == "json" else f"{out}: {text}")
    if not parity.ok:
        raise IntegrityError(f"{out}: the sharded model does not compute what {reference} does")

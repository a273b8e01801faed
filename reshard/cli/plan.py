"""`reshard plan`."""

from __future__ import annotations

from typing import Any

import click

from .common import Bytes, format_option, print_report, terminal_width, what_to_cut
from .speaking import say

__all__ = ["plan", "print_plan"]


@click.command()
@click.argument("source")
@click.option("--tp-size", "-tp", type=click.IntRange(min=1), help="Tensor-parallel ranks.")
@click.option(
    "--gpu-memory", type=Bytes(), help="Instead: the fewest ranks of which each holds so much of the weights."
)
@what_to_cut
@format_option
def plan(source: str, style: str, **cut: Any) -> None:
    """Print how SOURCE would be cut for a number of ranks: styles, placements, sizes, and which numbers are legal.

    Only headers are read; those of a Hub id or a URL by ranges, so that nothing large is fetched.

    \b
    Examples:
      reshard plan ./llama --tp-size 4
      reshard plan meta-llama/Llama-3.1-70B --gpu-memory 80GB
      reshard plan ./bert --tp-size 2 --plan bert.toml
    """
    print_plan(source, style, **cut)


def print_plan(source: str, style: str, **cut: Any) -> None:
    """Print the plan of SOURCE on stdout."""
    from .. import plan as run
    from ..showing.texts import plan_text

    print_report(run(source, say=say, **cut).to_dict(), style, lambda r: plan_text(r, terminal_width()))

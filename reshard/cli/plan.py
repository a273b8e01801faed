"""`reshard plan`."""

from __future__ import annotations

from typing import Any

import click

from .common import Bytes, format_option, print_report, terminal_width, what_to_cut
from .speaking import say

__all__ = ["plan", "print_plan"]


@click.command()
@click.argument("source")
@click.option("--tp-size", "-tp", type=click.IntRange(min=1), help="Number of ranks.")
@click.option(
    "--gpu-memory", type=Bytes(), help="Instead of --tp-size: the fewest ranks whose weights fit into this much each."
)
@what_to_cut
@format_option
def plan(source: str, style: str, **cut: Any) -> None:
    """Print how SOURCE would be cut for a number of ranks.

    The plan shows styles, placements, sizes, and which numbers of ranks are legal. Only headers are read. If
    SOURCE is a Hub id or a URL, they are fetched by ranges, so that nothing large is fetched.

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

"""`reshard plan`."""

from __future__ import annotations

from typing import Any

import click

from ..errors import UsageError
from ..files.dtypes import STORABLE, cache_dtype
from .common import Bytes, Dtype, format_option, print_report, terminal_blocks, terminal_width, what_to_cut
from .page import check_page, html_option, plan_commands, write_page
from .speaking import say

__all__ = ["plan", "print_plan"]


@click.command()
@click.argument("source")
@click.option("--tp-size", "-tp", type=click.IntRange(min=1), help="Number of ranks.")
@click.option("--gpu-memory", type=Bytes(), help="Instead of --tp-size: the fewest ranks with this much memory each.")
@click.option("--max-model-len", type=click.IntRange(min=1), help="Tokens of a sequence.  [default: the model's most]")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, help="Sequences at a time.")
@click.option("--kv-dtype", type=Dtype(cache_dtype, (*STORABLE, "fp8")), help="Dtype of the KV cache.")
@click.option(
    "--utilization",
    type=click.FloatRange(min=0, min_open=True, max=1),
    default=0.9,
    help="Part of a GPU's memory that weights and KV cache may take.",
)
@what_to_cut
@html_option
@format_option
def plan(source: str, style: str, tp_size: int | None, gpu_memory: int | None, html: str | None, **cut: Any) -> None:
    """Print how SOURCE would be cut for a number of ranks.

    The plan shows styles, placements, sizes, a bar for each rank, and which numbers of ranks are legal. Without a
    number, it shows weights and KV cache for every legal number. Only headers are read. If SOURCE is a Hub id or a
    URL, they are fetched by ranges, so that nothing large is fetched.

    \b
    Examples:
      reshard plan ./llama --tp-size 4
      reshard plan ./llama --tp-size 4 --html plan.html
      reshard plan ./llama
      reshard plan meta-llama/Llama-3.1-70B --gpu-memory 80GB --max-model-len 32768
      reshard plan ./bert --tp-size 2 --plan bert.toml
    """
    if tp_size is not None or gpu_memory is not None:
        print_plan(source, style, html=html, tp_size=tp_size, gpu_memory=gpu_memory, **cut)
    elif html is None:
        _print_sizes(source, style, **cut)
    else:
        raise UsageError("--html shows a plan for one number of ranks", hint="add --tp-size 2, or --gpu-memory 24GB")


def print_plan(source: str, style: str, *, html: str | None = None, part: str | None = None, **cut: Any) -> None:
    """Print the plan of SOURCE on stdout, with what a `part` of it is to do; write its page if `html` names one."""
    if html is not None:
        check_page(html)
    from .. import plan as run
    from ..showing.texts import part_text, plan_text

    planned = run(source, say=say, **cut)
    report = planned.to_dict()
    if html is not None:
        write_page(html, report, plan_commands(source, report))
    if part is not None:
        from ..operations.convert.part import planned_part

        changed = cut["quantize"] is not None or cut["dequantize"]
        report["part"] = planned_part(planned, part, changed=changed).to_dict()

    def text(report: dict[str, Any]) -> str:
        lines = [plan_text(report, terminal_width(), blocks=terminal_blocks())]
        return "\n".join([*lines, part_text(report["part"])] if part else lines)

    print_report(report, style, text)


def _print_sizes(
    source: str, style: str, *, drop_unused: bool, include: tuple[str, ...], utilization: float, **cut: Any
) -> None:
    """Print every legal number of ranks: tensors that are dropped and files that go along make no difference."""
    from .. import sizes as run
    from ..showing.texts import size_table_text

    report = {"sizes": [size.to_dict() for size in run(source, say=say, **cut)]}
    print_report(report, style, lambda r: size_table_text(r["sizes"], terminal_width()))

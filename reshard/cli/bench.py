"""`reshard bench`."""

from __future__ import annotations

from typing import Any

import click

from ..launch.options import bench_options

__all__ = ["bench"]


@click.command()
@bench_options
def bench(style: str, **options: Any) -> None:
    """Measure load, prefill, decode and memory of resharded folders.

    Each folder OUT runs on this machine, on as many processes as it has ranks, one thread each. If several are given,
    the speed-up is over the one with the fewest ranks.

    \b
    Examples:
      reshard bench llama-tp1 llama-tp2 llama-tp4 --plot speed-up.png
      reshard bench llama-tp2 --against transformers --source ./llama
      reshard bench llama-tp2 --batch 1,8 --compile
    """
    from ..launch.benchmark.start import bench_folders, report_text

    click.echo(report_text(bench_folders(options), style))

"""`reshard finish`."""

from __future__ import annotations

import time

import click

from ..text import printable, without_secrets
from .common import format_option, no_sync_option, print_report, workers_option
from .convert import next_command
from .speaking import duration, progress_bar, say

__all__ = ["finish"]


@click.command()
@click.argument("out", type=click.Path())
@workers_option
@no_sync_option
@format_option
def finish(out: str, workers: int | None, no_sync: bool, style: str) -> None:
    """Make the folder OUT of the parts that `reshard convert --part` made for it.

    Every byte is read again before OUT appears. Nothing happens if it is there already.

    \b
    Examples:
      reshard finish llama-tp8
    """
    from .. import finish as run

    began = time.monotonic()
    manifest = run(out, workers=workers, sync=not no_sync, progress=progress_bar, say=say)
    size, seconds = sum(record.size for record in manifest.rank_files), time.monotonic() - began
    print_report(
        {"out": without_secrets(out), "seconds": round(seconds, 3), **manifest.to_dict()},
        style,
        lambda report: f"{printable(out)}: {report['world_size']} rank files, {size:,} bytes, in {duration(seconds)}",
    )
    say(f"next: {next_command(manifest, source=out, out=out)}")

"""`reshard verify`."""

from __future__ import annotations

from typing import Any

import click

from ..text import printable
from .common import format_option, print_report, where_the_weights_are
from .speaking import progress_bar

__all__ = ["verify"]


@click.command()
@click.argument("out", type=click.Path())
@click.option("--against", metavar="SOURCE", help="Also compare every element with the checkpoint it was made from.")
@click.option("--revision", help="Branch, tag or commit of SOURCE if that is a Hub id.")
@where_the_weights_are
@click.option("--part", metavar="I/K", help="Check the rank files of one of K parts alone; or auto, as in `convert`.")
@format_option
def verify(out: str, against: str | None, part: str | None, style: str, **source: Any) -> None:
    """Check every byte of the resharded folder OUT by digest.

    \b
    Examples:
      reshard verify llama-tp4
      reshard verify llama-tp4 --against meta-llama/Llama-3.1-8B
      reshard verify llama-tp8 --part 1/4
    """
    from .. import verify as run

    found = run(out, against=against, part=part, progress=progress_bar, **source)
    compared = "" if found.elements is None else f", {found.elements:,} elements equal to the source"
    names = ("files", "tensors", "size", "elements")
    report = {"out": out, **{name: getattr(found, name) for name in names}}
    of = {"part": found.part.number, "of": found.part.of} if found.part else {}
    which = f"{found.part} is " if found.part else ""
    files = f"{found.files} file{'s' if found.files > 1 else ''}"
    print_report(
        {**report, **of},
        style,
        lambda r: f"{printable(out)}: {which}ok, {files}, {r['tensors']} tensors, {r['size']:,} bytes{compared}",
    )

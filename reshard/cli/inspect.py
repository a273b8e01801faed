"""`reshard inspect`."""

from __future__ import annotations

import click

from .common import format_option, print_report, revision_option, terminal_width

__all__ = ["inspect"]


@click.command()
@click.argument("out")
@revision_option
@format_option
def inspect(out: str, revision: str | None, style: str) -> None:
    """Print what OUT holds, from its manifest.

    OUT is a resharded folder, repo or URL.

    \b
    Example:
      reshard inspect llama-tp4
    """
    from .. import inspect as run
    from ..showing.texts import manifest_text

    found = run(out, revision=revision).to_dict()
    print_report(found, style, lambda report: manifest_text(report, terminal_width()))

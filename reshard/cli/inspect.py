"""`reshard inspect`."""

from __future__ import annotations

import click

from .common import format_option, print_report, revision_option, terminal_blocks, terminal_width
from .page import check_page, html_option, inspect_commands, write_page

__all__ = ["inspect"]


@click.command()
@click.argument("out")
@revision_option
@html_option
@format_option
def inspect(out: str, revision: str | None, html: str | None, style: str) -> None:
    """Print what OUT holds, from its manifest.

    OUT is a resharded folder, repo or URL.

    \b
    Examples:
      reshard inspect llama-tp4
      reshard inspect llama-tp4 --html llama-tp4.html
    """
    if html is not None:
        check_page(html)
    from .. import inspect as run
    from ..showing.texts import manifest_text

    found = run(out, revision=revision).to_dict()
    if html is not None:
        write_page(html, found, inspect_commands(out, found))
    print_report(found, style, lambda report: manifest_text(report, terminal_width(), blocks=terminal_blocks()))

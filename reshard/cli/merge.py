"""`reshard merge`."""

from __future__ import annotations

from typing import Any

import click

from ..text import printable, without_secrets
from .common import format_option, no_sync_option, print_report, revision_option, workers_option
from .speaking import progress_bar

_LAYOUT = "source: the files as they were. hf: the same with new headers, even if tensors were cast or dropped."

__all__ = ["merge"]


@click.command()
@click.argument("out")
@click.argument("dest", type=click.Path())
@revision_option
@click.option("--layout", type=click.Choice(["source", "hf"]), default="source", show_default=True, help=_LAYOUT)
@workers_option
@no_sync_option
@format_option
def merge(out: str, dest: str, workers: int | None, no_sync: bool, style: str, **how: Any) -> None:
    """Write the source files of OUT into the folder DEST as they were.

    OUT is a resharded folder, repo or URL. Neither the source nor transformers is needed. With --layout source the
    files are the same byte for byte: each is checked against the digest of the original.

    \b
    Examples:
      reshard merge llama-tp4 llama
      reshard merge org/llama/tp4 llama
      reshard merge llama-bf16-tp4 llama-bf16 --layout hf
    """
    from .. import merge as run

    files = run(out, dest, workers=workers, sync=not no_sync, progress=progress_bar, **how)
    which = "source files, as they were" if how["layout"] == "source" else "files with new headers"
    print_report(
        {"dest": without_secrets(dest), "files": list(files)},
        style,
        lambda _: f"{printable(dest)}: {len(files)} {which}",
    )

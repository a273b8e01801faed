"""`reshard convert`."""

from __future__ import annotations

from typing import Any

import click

from ..errors import printable, without_secrets
from .common import format_option, no_sync_option, print_report, progress_bar, say, what_to_cut, workers_option
from .plan import print_plan

__all__ = ["convert"]


@click.command()
@click.argument("source")
@click.argument("out", type=click.Path())
@click.option("--tp-size", "-tp", type=click.IntRange(min=1), required=True, help="Tensor-parallel ranks.")
@what_to_cut
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a resharded folder.")
@click.option("--keep-cache", is_flag=True, help="Keep what is fetched in the cache, not only while it is cut.")
@click.option(
    "--reference-logits",
    is_flag=True,
    help="Store what one process computes on fixed tokens, for `runtime check`. Loads the whole model into memory.",
)
@workers_option
@no_sync_option
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@format_option
def convert(
    source: str,
    out: str,
    overwrite: bool,
    keep_cache: bool,
    reference_logits: bool,
    workers: int | None,
    no_sync: bool,
    dry_run: bool,
    style: str,
    **cut: Any,
) -> None:
    """Write SOURCE (a checkpoint folder, Hub id or URL) into OUT (a folder or URL), one file for each rank.

    OUT appears only when it is complete. No GPU, no weights in memory. SOURCE can be a resharded folder too: the result
    is that of the checkpoint it was made from.

    \b
    Examples:
      reshard convert meta-llama/Llama-3.1-8B llama-tp4 --tp-size 4
      reshard convert llama-tp4 llama-tp8 --tp-size 8
      reshard convert Qwen/Qwen3-30B-A3B qwen-ep4 --tp-size 4 --ep-size 4
      reshard convert s3://bucket/llama s3://bucket/llama-tp4 --tp-size 4
    """
    if dry_run:
        print_plan(source, style, **cut)
        return
    from .. import convert as run
    from ..report import manifest_report

    manifest = run(
        source,
        out,
        overwrite=overwrite,
        keep_cache=keep_cache,
        reference_logits=reference_logits,
        workers=workers,
        sync=not no_sync,
        progress=progress_bar,
        say=say,
        **cut,
    )
    size = sum(record.size for record in manifest.rank_files)
    print_report(
        {"out": without_secrets(out), **manifest_report(manifest)},
        style,
        lambda report: f"{printable(out)}: {report['world_size']} rank files, {size:,} bytes",
    )

"""`reshard export`."""

from __future__ import annotations

import re
import shlex
import time
from typing import Any

import click

from ..showing.engines import serve_command
from ..text import printable, without_secrets
from .common import (
    Dtype,
    format_option,
    include_option,
    no_sync_option,
    print_report,
    revision_option,
    terminal_width,
    where_the_weights_are,
    workers_option,
)
from .speaking import duration, progress_bar, say

__all__ = ["export"]


class Capability(click.ParamType):
    """The compute capability of a GPU, such as 9.0."""

    name = "X.Y"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return (major, minor)."""
        match = re.fullmatch(r"(\d{1,2})\.(\d)", str(value))
        if match is None:
            self.fail(f"{value!r} is not a compute capability such as 9.0", param, ctx)
        return int(match[1]), int(match[2])


@click.command()
@click.argument("source")
@click.argument("out", type=click.Path())
@click.option("--engine", default="vllm", metavar="NAME", help="The engine that loads the files: vllm.")
@click.option("--tp-size", "-tp", type=click.IntRange(min=1), help="Number of ranks, the engine's -tp.")
@click.option("--pipeline-size", "-pp", type=click.IntRange(min=1), default=1, help="Number of stages, its -pp.")
@click.option("--ep", is_flag=True, help="For --enable-expert-parallel.")
@click.option(
    "--engine-python",
    type=click.Path(),
    metavar="PATH",
    help="The Python of the environment that has the engine.  [default: this one]",
)
@click.option(
    "--platform",
    metavar="cuda",
    help="Choose as the engine does on GPUs, on a machine that has none. It takes --capability.",
)
@click.option("--capability", type=Capability(), help="Compute capability of the GPUs: 8.0, 8.9, 9.0, 10.0 …")
@click.option("--moe-backend", metavar="NAME", help="The engine's option of the same name.")
@click.option(
    "--plan",
    type=click.Path(exists=True, dir_okay=False),
    help="A copy plan that an earlier export kept, in place of the engine.",
)
@revision_option
@click.option("--dtype", type=Dtype(), help="The engine's --dtype.  [default: what it takes for the checkpoint]")
@where_the_weights_are
@include_option
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a resharded folder.")
@workers_option
@no_sync_option
@click.option(
    "--dry-run", is_flag=True, help="Ask the engine, print what its rank files would hold, and write nothing."
)
@format_option
def export(source: str, out: str, no_sync: bool, dry_run: bool, style: str, **options: Any) -> None:
    """Write SOURCE into OUT as the rank files of the engine that you serve with.

    SOURCE is a checkpoint folder, a resharded folder, Hub id or URL; OUT is a folder or URL. The engine's own loader,
    run without weights, says where each element belongs. No GPU is needed, and memory does not grow with the model.

    \b
    Examples:
      reshard export org/model model-vllm -tp 2 --engine-python vllm-env/bin/python --platform cuda --capability 9.0
      reshard export org/model model-vllm --plan model-vllm-old/reshard.copy-plan.gz
    """
    began = time.monotonic()
    from .. import export as run
    from ..showing.texts import manifest_text

    if dry_run:
        draft = run(source, out, dry_run=True, progress=progress_bar, say=say, **options).to_dict()
        print_report(draft, style, lambda report: manifest_text(report, terminal_width()))
        return
    manifest = run(source, out, sync=not no_sync, progress=progress_bar, say=say, **options)
    size, seconds = sum(record.size for record in manifest.rank_files), time.monotonic() - began
    print_report(
        {"out": without_secrets(out), "seconds": round(seconds, 3), **manifest.to_dict()},
        style,
        lambda report: f"{printable(out)}: {report['world_size']} rank files, {size:,} bytes, in {duration(seconds)}",
    )
    say(f"next: {shlex.join(serve_command(without_secrets(out), manifest.engine or {}))}")

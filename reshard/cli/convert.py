"""`reshard convert`."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from ..text import printable, without_secrets
from .common import format_option, no_sync_option, print_report, what_to_cut, workers_option
from .plan import print_plan
from .speaking import duration, progress_bar, say

if TYPE_CHECKING:
    from ..resharded.manifest import Manifest

__all__ = ["convert"]


@click.command()
@click.argument("source")
@click.argument("out", type=click.Path())
@click.option("--tp-size", "-tp", type=click.IntRange(min=1), help="Number of ranks.")
@click.option(
    "--like",
    type=click.Path(),
    metavar="DIR",
    help="Cut as the resharded folder DIR is, for new weights of its model; what is the same shares its blocks.",
)
@what_to_cut
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a resharded folder.")
@click.option("--keep-cache", is_flag=True, help="Keep fetched files in the cache after they are cut.")
@click.option(
    "--reference-logits",
    is_flag=True,
    help="Store what one process computes on fixed tokens, for `reshard check`. It loads the whole model into memory.",
)
@click.option(
    "--part",
    metavar="I/K",
    help="Make one of K parts, for `reshard finish`. auto: torchrun, MPI or Slurm say which; auto/K: Kubernetes too;"
    " the last part to be done finishes.",
)
@workers_option
@no_sync_option
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@format_option
def convert(
    source: str,
    out: str,
    tp_size: int | None,
    like: str | None,
    overwrite: bool,
    keep_cache: bool,
    reference_logits: bool,
    part: str | None,
    workers: int | None,
    no_sync: bool,
    dry_run: bool,
    style: str,
    **cut: Any,
) -> None:
    """Write SOURCE into OUT, one safetensors file for each rank.

    SOURCE is a checkpoint folder, Hub id or URL; OUT is a folder or URL. OUT appears only when it is complete. No GPU
    is needed, and memory does not grow with the model. If SOURCE is a resharded folder, the result is that of the
    checkpoint it was made from.

    \b
    Examples:
      reshard convert meta-llama/Llama-3.1-8B llama-tp4 --tp-size 4
      reshard convert llama-tp4 llama-tp8 --tp-size 8
      reshard convert meta-llama/Llama-3.1-8B llama-nf4 --tp-size 2 --quantize nf4
      reshard convert Qwen/Qwen3-30B-A3B qwen-ep4 --tp-size 4 --ep-size 4
      reshard convert s3://bucket/llama s3://bucket/llama-tp4 --tp-size 4
      reshard convert ./llama-week-2 llama-week-2-tp4 --like llama-week-1-tp4
      reshard convert meta-llama/Llama-3.1-405B llama-tp8 --tp-size 8 --part 1/4
    """
    if part is not None:
        _refuse(overwrite, "--overwrite", "--part", "remove what is at OUT yourself")
        _refuse(reference_logits, "--reference-logits", "--part", "reshard check OUT --reference SOURCE compares too")
        _refuse(like is not None, "--like", "--part", "make the parts with --tp-size")
    _refuse(dry_run and like is not None, "--like", "--dry-run", "the plan is that of: reshard inspect DIR")
    if like is None and tp_size is None:
        raise UsageError("--tp-size is missing", hint="give --tp-size 2, or --like DIR")
    if dry_run:
        print_plan(source, style, part=part, tp_size=tp_size, **cut)
        return
    if part is not None:
        made = {"keep_cache": keep_cache, "workers": workers, "sync": not no_sync}
        _convert_part(source, out, style, part=part, tp_size=tp_size, **made, **cut)
        return
    began = time.monotonic()
    from .. import convert as run
    from ..checkpoint.companions import left_report

    manifest = run(
        source,
        out,
        tp_size=tp_size,
        like=like,
        overwrite=overwrite,
        keep_cache=keep_cache,
        reference_logits=reference_logits,
        workers=workers,
        sync=not no_sync,
        progress=progress_bar,
        say=say,
        **cut,
    )
    size, seconds = sum(record.size for record in manifest.rank_files), time.monotonic() - began
    print_report(
        {
            "out": without_secrets(out),
            "seconds": round(seconds, 3),
            **manifest.to_dict(),
            "left_behind": left_report(manifest.left),
        },
        style,
        lambda report: f"{printable(out)}: {report['world_size']} rank files, {size:,} bytes, in {duration(seconds)}",
    )
    say(f"next: {next_command(manifest, source=source, out=out, **cut)}")


def _refuse(given: bool, option: str, other: str, hint: str) -> None:
    if given:
        raise UsageError(f"{option} does not go with {other}", hint=hint)


def _convert_part(source: str, out: str, style: str, **how: Any) -> None:
    from .. import convert_part as run
    from ..showing.texts import part_text

    began = time.monotonic()
    done = run(source, out, progress=progress_bar, say=say, **how)
    seconds = time.monotonic() - began
    print_report(
        {"out": without_secrets(out), "seconds": round(seconds, 3), **done.to_dict()},
        style,
        lambda report: f"{printable(out)}: {part_text(report)}, in {duration(seconds)}",
    )
    finish = shlex.join(("reshard", "finish", without_secrets(out)))
    if done.manifest:
        say(f"finished: {printable(out)} is whole")
    elif how["part"].startswith("auto"):
        say("the last part to be done finishes the folder")
    else:
        say(f"next, when all parts are done: {finish}")


def next_command(
    manifest: Manifest,
    *,
    source: str,
    out: str,
    strategies: str | None = None,
    weights: str | None = None,
    links_into: Sequence[str] = (),
    revision: str | None = None,
    **_: Any,
) -> str:
    """Return the command to run next on `out`: generate if it has what that takes, else check it.

    Its other arguments are those of the conversion.
    """
    from ..resharded.manifest import REFERENCE_NAME
    from ..storage.stores import is_url

    def line(*words: str) -> str:
        styles = () if strategies is None else ("--strategies", strategies)
        return shlex.join(("reshard", *words, *styles))

    where = without_secrets(out)
    extras = {extra.name for extra in manifest.extras}
    if "generation_config.json" in extras and any(name.startswith("tokenizer") for name in extras):
        return line("run", where, "--prompt", "Once upon a time")
    if REFERENCE_NAME in extras:
        return line("check", where)
    if not _is_origin(source, manifest):  # the checkpoint it was made from may be gone
        return shlex.join(("reshard", "inspect" if is_url(out) else "verify", where))
    at = () if revision is None else ("--revision", revision)
    if weights is not None or links_into:  # `check` has no such options
        found = () if weights is None else ("--weights", weights)
        links = [word for folder in links_into for word in ("--links-into", folder)]
        return shlex.join(("reshard", "verify", where, "--against", without_secrets(source), *at, *found, *links))
    return line("check", where, "--reference", without_secrets(source), *at)


def _is_origin(source: str, manifest: Manifest) -> bool:
    """Whether `source` is the checkpoint itself, as far as can be told: not a resharded folder, here or elsewhere."""
    from ..checkpoint.source import is_resharded
    from ..storage.hub.address import Place
    from ..storage.stores import is_url

    if Path(source).is_dir():
        return not is_resharded(Path(source))
    return not is_url(source) and str(Place.parse(source)) == manifest.repo_id

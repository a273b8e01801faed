"""The `reshard` command. Each command parses, makes one library call and prints; errors become exit codes in `main`."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ._version import __version__
from .cli_common import Bytes, format_option, print_report, progress_bar, revision_option
from .cli_hub import publish, pull
from .errors import StorageError, printable, without_secrets
from .failures import Terminated, report_failure, terminate, wants_traceback
from .process import patient_from_now_on, worker_count

__all__ = ["cli", "entry", "main"]

_LAYOUT = "The files as they were, or the same with new headers: also of what was cast or dropped."
_DTYPES = ["float32", "float16", "bfloat16"]

_workers = click.option("--workers", type=click.IntRange(min=1), help="Writing threads. [default: the CPUs, at most 8]")
_no_sync = click.option(
    "--no-sync", is_flag=True, help="Do not wait for the disk. A power loss soon after can undo the work."
)
_WHAT_TO_CUT = (
    click.option(
        "--ep-size",
        type=click.IntRange(min=1),
        default=1,
        help="Spread whole experts over this many ranks. One of --tp-size and --ep-size divides the other.",
    ),
    click.option(
        "--plan",
        "tp_plan",
        type=click.Path(exists=True, dir_okay=False),
        help='Rules (pattern → style, JSON or TOML) instead of the model\'s, or beside them with extends = "auto".',
    ),
    click.option(
        "--strategies",
        type=click.Path(exists=True, dir_okay=False),
        help="Python file that registers styles of your own. It is run.",
    ),
    revision_option,
    click.option("--dtype", type=click.Choice(_DTYPES), help="Store floating parameters in this dtype."),
    click.option("--drop-unused", is_flag=True, help="Leave out tensors that the model does not use."),
)


def _what_to_cut(command: Callable[..., None]) -> Callable[..., None]:
    """The options that `plan` and `convert` share. The command gets them as the library's arguments."""

    @functools.wraps(command)
    def with_library_arguments(*arguments: Any, tp_plan: str | None, strategies: str | None, **options: Any) -> None:
        if tp_plan is not None:
            options["tp_plan"] = tp_plan
        if strategies is not None:
            from .strategies import load_strategies

            options["strategies"] = load_strategies(strategies)
        command(*arguments, **options)

    for option in reversed(_WHAT_TO_CUT):
        with_library_arguments = option(with_library_arguments)
    return with_library_arguments


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="reshard")
@click.option("--verbose", "-v", is_flag=True, help="Show the traceback of an error.")
def cli(verbose: bool) -> None:
    """Reshard a Hub checkpoint once, offline, into one safetensors file per tensor-parallel rank.

    \b
    reshard convert org/model model-tp2 --tp-size 2
    reshard run model-tp2 --prompt "Hello"
    """


@cli.command()
@click.argument("source")
@click.argument("out", type=click.Path())
@click.option("--tp-size", "-tp", type=click.IntRange(min=1), required=True, help="Tensor-parallel ranks.")
@_what_to_cut
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a resharded folder.")
@click.option("--keep-cache", is_flag=True, help="Keep what is fetched in the cache, not only while it is cut.")
@click.option(
    "--reference-logits",
    is_flag=True,
    help="Store what one process computes on fixed tokens, for `runtime check`. Loads the whole model into memory.",
)
@_workers
@_no_sync
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
        _print_plan(source, style, **cut)
        return
    from . import convert as run
    from .report import manifest_report

    manifest = run(
        source,
        out,
        overwrite=overwrite,
        keep_cache=keep_cache,
        reference_logits=reference_logits,
        workers=workers,
        sync=not no_sync,
        progress=progress_bar,
        **cut,
    )
    size = sum(record.size for record in manifest.rank_files)
    print_report(
        {"out": without_secrets(out), **manifest_report(manifest)},
        style,
        lambda report: f"{printable(out)}: {report['world_size']} rank files, {size:,} bytes",
    )


@cli.command()
@click.argument("source")
@click.option("--tp-size", "-tp", type=click.IntRange(min=1), help="Tensor-parallel ranks.")
@click.option(
    "--gpu-memory", type=Bytes(), help="Instead: the fewest ranks of which each holds so much of the weights."
)
@_what_to_cut
@format_option
def plan(source: str, style: str, **cut: Any) -> None:
    """Print how SOURCE would be cut for a number of ranks: styles, placements, sizes, and which numbers are legal.

    Only headers are read; those of a Hub id or a URL by ranges, so that nothing large is fetched.

    \b
    Examples:
      reshard plan ./llama --tp-size 4
      reshard plan meta-llama/Llama-3.1-70B --gpu-memory 80GB
      reshard plan ./bert --tp-size 2 --plan bert.toml
    """
    _print_plan(source, style, **cut)


def _print_plan(source: str, style: str, **cut: Any) -> None:
    from . import plan as run
    from .conversion import plan_layouts
    from .planning import legal_sizes
    from .reader import BLOCK_BYTES
    from .report import plan_report, plan_text

    planned = run(source, **cut)
    sizes = legal_sizes(planned.model)
    print_report(plan_report(planned, plan_layouts(planned), sizes, worker_count() * BLOCK_BYTES), style, plan_text)


@cli.command()
@click.argument("out")
@revision_option
@format_option
def inspect(out: str, revision: str | None, style: str) -> None:
    """Print what a resharded folder, repo or URL OUT holds, from its manifest.

    \b
    Example:
      reshard inspect llama-tp4
    """
    from . import inspect as run
    from .report import manifest_report, manifest_text

    print_report(manifest_report(run(out, revision=revision)), style, manifest_text)


@cli.command()
@click.argument("out", type=click.Path())
@click.option("--against", metavar="SOURCE", help="Also compare every element with the checkpoint it was made from.")
@click.option("--revision", help="Branch, tag or commit of SOURCE where that is a Hub id.")
@format_option
def verify(out: str, against: str | None, revision: str | None, style: str) -> None:
    """Check every byte of the resharded folder OUT by digest.

    \b
    Examples:
      reshard verify llama-tp4
      reshard verify llama-tp4 --against meta-llama/Llama-3.1-8B
    """
    from . import verify as run
    from .manifest import read_manifest

    total = sum(record.size for record in read_manifest(Path(out)).rank_files)
    with progress_bar(total, "checking") as report:
        found = run(out, against=against, revision=revision, progress=report)
    compared = "" if found.elements is None else f", {found.elements:,} elements equal to the source"
    print_report(
        {"out": out, "files": found.files, "tensors": found.tensors, "size": found.size, "elements": found.elements},
        style,
        lambda r: f"{printable(out)}: ok, {r['files']} files, {r['tensors']} tensors, {r['size']:,} bytes{compared}",
    )


@cli.command()
@click.argument("out")
@click.argument("dest", type=click.Path())
@revision_option
@click.option("--layout", type=click.Choice(["source", "hf"]), default="source", show_default=True, help=_LAYOUT)
@_workers
@_no_sync
@format_option
def merge(out: str, dest: str, workers: int | None, no_sync: bool, style: str, **how: Any) -> None:
    """Write the source files of the resharded folder, repo or URL OUT into the folder DEST, byte for byte as they were.

    Neither the source nor transformers is needed. Each file is checked against the digest of the original.

    \b
    Examples:
      reshard merge llama-tp4 llama
      reshard merge org/llama/tp4 llama
      reshard merge llama-bf16-tp4 llama-bf16 --layout hf
    """
    from . import merge as run

    files = run(out, dest, workers=workers, sync=not no_sync, progress=progress_bar, **how)
    which = "source files, as they were" if how["layout"] == "source" else "files with headers anew"
    print_report(
        {"dest": without_secrets(dest), "files": list(files)},
        style,
        lambda _: f"{printable(dest)}: {len(files)} {which}",
    )


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("out", type=click.Path())
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option("--dp", type=click.IntRange(min=1), default=1, metavar="K", help="Replicas: K times as many processes.")
@click.pass_context
def run(context: click.Context, out: str, options: tuple[str, ...], dp: int) -> None:
    """Generate text from the resharded folder OUT, on as many processes as it has ranks.

    OPTIONS are those of `python -m runtime generate`, whose help has them all. What to continue: --prompt, --prompts,
    --chat. How: --max-new-tokens, --stop, --temperature, --top-p, --top-k, --seed, --batch-size. By which kernels:
    --device, --attn, --sdpa, --cache, --compile. What to print: --format, --report.

    \b
    Examples:
      reshard run llama-tp2 --prompt "The capital of France is"
      reshard run llama-tp2 --chat --max-new-tokens 500
      reshard run llama-tp2 --prompts lines.txt --format json
      reshard run llama-tp2 --prompt "Once" --temperature 0.8 --top-p 0.9 --seed 7
    """
    from .launch import launch

    verbose = ["--verbose"] if context.find_root().params["verbose"] else []
    sys.exit(launch(out, [*verbose, "generate", out, "--dp", str(dp), *options], replicas=dp))


cli.add_command(publish)
cli.add_command(pull)


def main(arguments: list[str] | None = None, *, command: click.Command = cli) -> None:
    """Entry point: run the command line, and turn every failure into its line and exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, terminate)
    try:
        command.main(arguments, standalone_mode=False)
    except click.exceptions.Exit as finished:
        sys.exit(finished.exit_code)
    except Exception as error:
        sys.exit(report_failure(error, verbose=wants_traceback(arguments)))
    except (KeyboardInterrupt, Terminated) as error:
        sys.exit(report_failure(error, verbose=False))


def entry() -> None:
    """The `reshard` command as a process: it starts and ends as fast as Python lets it.

    Taking the modules of torch and transformers apart at the end would take a second.
    """
    patient_from_now_on()
    try:
        main()
        code: Any = 0
    except SystemExit as ended:
        code = ended.code
    try:
        sys.stdout.flush()
    except OSError as error:  # what was to be printed is not: the reader has gone, or the disk is full
        gone = isinstance(error, BrokenPipeError)
        code = (
            128 + signal.SIGPIPE if gone else report_failure(StorageError(f"output: {error.strerror}"), verbose=False)
        )
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code or 0)

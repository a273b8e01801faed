"""`bench`, as a command: on the ranks it measures; outside of torchrun it starts a job for each folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from reshard.errors import ReshardError, UsageError, printable
from reshard.places import find_resharded, resolve_source

from ..bench import Measured, Settings, measure
from ..bench_runs import Job, JobFailedError, Report, report_of, run_jobs, summary
from ..chart import check_chart, draw
from ..engines import PEERS, Engine, peer
from ..kernels import sdpa
from ..ranks import RankInfo
from .options import format_option, load_model, model_options, say, sdpa_option

__all__ = ["bench"]


class Batches(click.ParamType):
    """Batch sizes: 1,2,4."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Numbers of a text such as 1,2,4."""
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and int(part) for part in parts):
            self.fail(f"{value!r} is not a list of batch sizes such as 1,2,4", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


@click.command()
@click.argument("outs", nargs=-1, required=True, metavar="OUT…")
@click.option("--batch", "batches", type=Batches(), default="1,2,4", show_default=True, help="Prompts at once.")
@click.option("--length", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of a prompt.")
@click.option("--steps", type=click.IntRange(min=0), default=8, show_default=True, help="Tokens decoded behind it.")
@click.option("--compile", "compiled", is_flag=True, help="Compiled too, prefill and decode.")
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True, help="Jobs of each kind, in turn.")
@click.option(
    "--against", type=click.Choice(sorted(PEERS)), multiple=True, help="Measure this too, on as many ranks. Repeatable."
)
@click.option("--source", metavar="SOURCE", help="The checkpoint, for --against.")
@click.option("--plot", metavar="FILE", help="Draw the speed-up against the batch size: .png, .svg or .pdf.")
@click.option("--engine", default="reshard", hidden=True)
@click.option("--result", hidden=True, help="Where rank 0 leaves what it measured.")
@sdpa_option
@model_options
@format_option
def bench(
    outs: tuple[str, ...],
    batches: tuple[int, ...],
    length: int,
    steps: int,
    compiled: bool,
    repeat: int,
    against: tuple[str, ...],
    source: str | None,
    plot: str | None,
    engine: str,
    result: str | None,
    style: str,
    kernel: str | None,
    **options: Any,
) -> None:
    """Measure load, prefill, decode and memory; of several folders OUT, the speed-up over the fewest ranks.

    Each folder runs on as many processes as it has ranks, on this machine, one thread each. Under torchrun: one folder,
    on the ranks that there are.

    \b
    Examples:
      python -m runtime bench llama-tp1 llama-tp2 llama-tp4 --plot speed-up.png
      python -m runtime bench llama-tp2 --against transformers --source ./llama
      torchrun --no-python --nproc-per-node 2 reshard-rank bench llama-tp2 --batch 1,8 --compile
    """
    settings = Settings(batches, length, steps, compiled)
    if RankInfo.from_env(os.environ).attempt is not None:
        if len(outs) > 1 or against or plot:
            raise UsageError("under torchrun, one folder is measured, and nothing drawn", hint="start it with python")
        with sdpa(kernel):
            measured = _measure(outs[0], engine, settings, source, result, {**options, "kernel": kernel})
        if measured and result is None:
            _show(report_of([[measured]]), style)
        return
    if against and source is None:
        raise UsageError("--against runs the checkpoint that OUT was made from", hint="name it: --source SOURCE")
    if against and source is not None:
        resolve_source(source)  # now, and not after this runtime was measured
    if plot:
        check_chart(plot)
    jobs = [Job(name, out) for name in ("reshard", *against) for out in outs]
    arguments = [*_arguments(settings, {**options, "sdpa": kernel}), *(["--source", source] if source else [])]
    try:
        report = run_jobs(jobs, arguments, repeat)
    except JobFailedError as failed:
        raise click.exceptions.Exit(failed.exit_code) from None
    if plot:
        chart(report, plot)
    _show(report, style)


def _measure(
    out: str, name: str, settings: Settings, source: str | None, result: str | None, options: dict[str, Any]
) -> Measured | None:
    """What this rank measures; None where it has no part in it. Rank 0 leaves it at `result`.

    Why another engine cannot run goes there too, whichever rank it is that fails, and ends the job.
    """
    ranks = RankInfo.from_env(os.environ)
    if name == "tensor_parallel" and ranks.rank != 0:
        return None
    try:
        if name == "reshard":
            engine = Engine(name, ranks.world_size, partial(load_model, out, **options))
        else:
            root = resolve_source(source or "", revision=None).root
            engine = peer(name, root, ranks.world_size, find_resharded(out, world_size=ranks.world_size).manifest.dtype)
        measured = measure(engine, settings)
    except Exception as error:
        if name == "reshard" or result is None:
            raise
        words = error.message if isinstance(error, ReshardError) else f"{type(error).__name__}: {error}"
        Path(result).write_text(json.dumps({"error": printable(words.partition("\n")[0])}))
        raise click.exceptions.Exit(1) from None
    if result is not None and ranks.rank == 0:
        Path(result).write_text(json.dumps(measured.to_json()))
    return measured


def _arguments(settings: Settings, options: dict[str, Any]) -> list[str]:
    """The options again, as a job's command line."""
    found = ["--batch", ",".join(map(str, settings.batches)), "--length", str(settings.length)]
    found += ["--steps", str(settings.steps), *(["--compile"] if settings.compiled else [])]
    for name, value in options.items():
        if value is True:
            found.append(f"--{name.replace('_', '-')}")
        elif value not in (None, False):
            found += [f"--{name.replace('_', '-')}", str(value)]
    return found


def chart(report: Report, path: str) -> None:
    """The speed-up over the fewest ranks against the batch size, a line for each engine and number of ranks."""
    base = report.base
    batches: Sequence[int] = sorted({point.batch for point in base.points})
    title = f"{base.model}, {base.dtype}, prompts of {base.length} tokens, {base.device}"
    over = "one rank" if base.ranks == 1 else f"{base.ranks} ranks"
    over += f" of {printable(base.folder)}" if base.folder else ""
    draw(path, title, "batch size", f"speed-up over {over}", report.lines(), ticks=batches)


def _show(report: Report, style: str) -> None:
    say(json.dumps(report.to_json(), indent=1) if style == "json" else summary(report))

"""The command `bench` of a rank: under torchrun it measures these ranks, otherwise it starts ranks."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import click

from reshard.errors import ReshardError, UsageError
from reshard.launch.benchmark.measured import Measured, Settings
from reshard.launch.benchmark.runs import report_of
from reshard.launch.benchmark.start import bench_folders, report_text
from reshard.launch.options import bench_options, job_options
from reshard.storage.locate import find_resharded, resolve_source
from reshard.text import printable

from ..benchmark.engines import Engine, peer
from ..benchmark.measure import measure
from ..distributed.ranks import RankInfo
from ..model.kernels import sdpa
from .options import load_model, say

__all__ = ["bench"]


@click.command()
@bench_options
@job_options
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
    computes: tuple[str, ...],
    engine: str | None,
    compute: str | None,
    folder: str | None,
    result: str | None,
    style: str,
    kernel: str | None,
    **options: Any,
) -> None:
    """Measure load, prefill, decode and memory. `reshard bench` runs this on each rank. Under torchrun, it measures one
    folder on the ranks of the job; otherwise it does what `reshard bench` does.

    \b
    Example:
      torchrun --no-python --nproc-per-node 2 reshard-rank bench llama-tp2 --batch 1,8 --compile
    """
    if RankInfo.from_env(os.environ).attempt is None:
        say(report_text(bench_folders(click.get_current_context().params), style))
        return
    if folder is None and (len(outs) > 1 or len(computes) > 1 or against or plot):
        raise UsageError("under torchrun, one folder is measured, and nothing drawn", hint="use reshard bench")
    settings = Settings(batches, length, steps, compiled)
    with sdpa(kernel):
        loads = {**options, "kernel": kernel, "compute": compute or computes[0]}
        measured = _measure(folder or outs[0], engine or "reshard", settings, source, result, loads)
    if measured and result is None:
        say(report_text(report_of([[measured]]), style))


def _measure(
    out: str, name: str, settings: Settings, source: str | None, result: str | None, options: dict[str, Any]
) -> Measured | None:
    """Return what this rank measures; None if it takes no part. Rank 0 writes it to the file `result`.

    If another engine cannot run, the rank that fails writes the reason there instead, and ends the job.
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

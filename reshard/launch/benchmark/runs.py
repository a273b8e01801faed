"""A benchmark over several numbers of ranks and engines: a torchrun job for each, in turn, and their report."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any, TypeVar

from ...errors import ReshardError
from ...text import printable
from ..agent import launch
from ..asked import look_at_folder
from ..switches import switches_of
from .measured import Measured, Point

__all__ = ["Failed", "Job", "Report", "in_turn", "report_of", "run_jobs", "summary"]

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job:
    """An engine on the ranks of the folder `out`. `compute` says what computes with quantized weights, for ours."""

    engine: str
    out: str
    compute: str | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """An engine that could not be measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """Medians over all jobs of each kind, and the engines that failed."""

    repeat: int
    measured: tuple[Measured, ...]
    failed: tuple[Failed, ...] = ()

    @property
    def base(self) -> Measured:
        """The base of speed-ups: the fewest ranks, of this runtime if it was measured."""
        return min(self.measured, key=lambda one: (one.engine != "reshard", one.ranks))

    def speed_up(self, point: Point) -> float | None:
        """Return the speed of a point over the base's at the same batch size, both compiled or neither."""
        same = [p.prefill for p in self.base.points if (p.batch, p.compiled) == (point.batch, point.compiled)]
        return same[0] / point.prefill if same else None

    def lines(self) -> dict[str, list[tuple[float, float]]]:
        """Return points (batch size, speed-up) by engine and number of ranks."""
        found: dict[str, list[tuple[float, float]]] = {}
        for one in self.measured:
            for point in one.points:
                ratio = self.speed_up(point)
                if ratio is not None:
                    found.setdefault(label(one, compiled=point.compiled), []).append((point.batch, ratio))
        return found

    def to_json(self) -> dict[str, Any]:
        series = [
            {
                "name": label(one, compiled=compiled),
                **{key: value for key, value in one.to_json().items() if key != "points"},
                "compiled": compiled,
                "points": [_point(self, one, point) for point in one.points if point.compiled == compiled],
            }
            for one in self.measured
            for compiled in sorted({point.compiled for point in one.points})
        ]
        failed = [{"name": one.name, "reason": one.reason} for one in self.failed]
        return {"repeat": self.repeat, "base": label(self.base), "series": series, "failed": failed}


def _point(report: Report, one: Measured, point: Point) -> dict[str, Any]:
    return {
        "batch": point.batch,
        "prefill_seconds": point.prefill,
        "prefill_tokens_per_second": point.batch * one.length / point.prefill,
        "decode_tokens_per_second": point.batch / point.decode if point.decode else None,
        "speed_up": report.speed_up(point),
    }


def label(one: Measured, *, compiled: bool = False) -> str:
    """Return the name of a series."""
    return f"{_name(one.engine, one.ranks, one.folder, one.compute)}{', compiled' if compiled else ''}"


def _name(engine: str, ranks: int, folder: str | None, compute: str | None = None) -> str:
    return f"{engine} tp {ranks}" + (f" ({printable(folder)})" if folder else "") + (f", {compute}" if compute else "")


def _folders(jobs: Sequence[Job], sizes: Mapping[str, int]) -> dict[Job, str | None]:
    """Return what to call the folder of each job: its name, or its path if another folder has the same name.

    It is None if the engine runs on no other folder with as many ranks.
    """
    alike: dict[tuple[str, int], list[str]] = defaultdict(list)
    for job in dict.fromkeys(replace(job, compute=None) for job in jobs):
        alike[job.engine, sizes[job.out]].append(job.out)
    found: dict[Job, str | None] = {}
    for (engine, _), outs in alike.items():
        last = [PurePath(out).name for out in outs]
        for out, name in zip(outs, last):
            found[Job(engine, out)] = None if len(outs) == 1 else name if name and last.count(name) == 1 else out
    return {job: found[replace(job, compute=None)] for job in jobs}


def in_turn(repeat: int, contenders: Mapping[K, Callable[[], T]]) -> dict[K, list[T]]:
    """Return each contender's results of `repeat` rounds. A round runs each one once, so that drift meets all alike."""
    found: dict[K, list[T]] = {name: [] for name in contenders}
    for _ in range(repeat):
        for name, run in contenders.items():
            found[name].append(run())
    return found


def run_jobs(jobs: Sequence[Job], words: Sequence[str], repeat: int, *, revision: str | None = None) -> Report:
    """Run `reshard-rank bench` on the ranks of each folder, `repeat` times in turn.

    `words` are the command line of `bench`, with every folder. A rank stands for a device, so it has one thread unless
    OMP_NUM_THREADS says otherwise. If another engine fails, the report says why, and the rest go on.

    Raises:
        ReshardError: this runtime cannot run a folder.
        JobFailedError: this runtime cannot run a folder, and a rank has said why.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    manifests = {out: look_at_folder(out, revision) for out in dict.fromkeys(job.out for job in jobs)}
    sizes = {out: manifest.world_size for out, manifest in manifests.items()}
    jobs = [job if manifests[job.out].bundles else replace(job, compute=None) for job in jobs]
    folders = _folders(jobs, sizes)
    compared = len({job.compute for job in jobs if job.compute}) > 1
    failed: dict[Job, Failed] = {}

    def run(job: Job) -> Measured | None:
        if job in failed:
            return None
        found = _run(job, words, sizes[job.out])
        if isinstance(found, str):
            failed[job] = Failed(_name(job.engine, sizes[job.out], folders[job]), found)
            return None
        return replace(found, folder=folders[job], compute=job.compute if compared else None)

    runs = in_turn(repeat, {job: partial(run, job) for job in dict.fromkeys(jobs)})
    measured = [[one for one in found if one] for job, found in runs.items() if job not in failed]
    return report_of(measured, tuple(failed.values()))


def report_of(runs: Sequence[Sequence[Measured]], failed: tuple[Failed, ...] = ()) -> Report:
    """Return the report of the runs of each kind."""
    return Report(max(map(len, runs)), tuple(map(_median, runs)), failed)


class JobFailedError(Exception):
    """A job of this runtime ended with an exit code, and has said why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def _run(job: Job, words: Sequence[str], ranks: int) -> Measured | str:
    """Return what a job measured, or why another engine failed."""
    ours = job.engine == "reshard"
    with tempfile.TemporaryDirectory(prefix="reshard-bench-") as folder:
        result = Path(folder, "result.json")
        try:
            told = ["--engine", job.engine, "--on", job.out, "--result", str(result)]
            told += ["--computed", job.compute] if job.compute else []
            code = launch([*switches_of(), "bench", *told, *words], ranks)
        except ReshardError as error:
            if ours:
                raise
            return error.message
        found = json.loads(result.read_text()) if result.exists() else {}
    if "error" in found:
        return found["error"]
    if code:
        if ours:
            raise JobFailedError(code)
        return f"ended with exit code {code}"
    return Measured.from_json(found)


def _median(runs: Sequence[Measured]) -> Measured:
    """Return the median of every figure, but the most memory."""

    def over(values: Sequence[float | None]) -> Any:
        return None if None in values else statistics.median(values)  # type: ignore[type-var]

    points = tuple(
        replace(
            point,
            prefill=over([run.points[at].prefill for run in runs]),
            decode=over([run.points[at].decode for run in runs]),
        )
        for at, point in enumerate(runs[0].points)
    )
    return replace(
        runs[0],
        load=over([run.load for run in runs]),
        parts={part: over([run.parts[part] for run in runs]) for part in runs[0].parts},
        first_token=over([run.first_token for run in runs]),
        memory=max(run.memory for run in runs),
        points=points,
    )


def summary(report: Report) -> str:
    """Return the report as tables."""
    first = report.measured[0]
    wide = max(28, *(len(name) for name in report.lines()))
    lines = [
        f"{first.model}, {first.dtype}, {first.device}, {first.threads} thread{'s' * (first.threads > 1)} a rank;"
        f" prompts of {first.length} tokens; medians of {report.repeat} job{'s' * (report.repeat > 1)}",
        f"  {'':{wide}} {'load':>8} {'first token':>12} {'memory':>10}",
    ]
    for one in report.measured:
        token = "" if one.first_token is None else f"{one.first_token:.2f} s"
        lines.append(f"  {label(one):{wide}} {f'{one.load:.2f} s':>8} {token:>12} {f'{one.memory >> 20:,} MiB':>10}")
    over = label(report.base)
    lines += ["", f"  {'':{wide}} {'batch':>5} {'prefill':>10} {'tokens/s':>10} {'decode':>16}   × {over}"]
    for one in report.measured:
        for point in sorted(one.points, key=lambda point: point.compiled):
            decode = f"{point.batch / point.decode:,.1f} tokens/s" if point.decode else ""
            ratio = report.speed_up(point)
            lines.append(
                f"  {label(one, compiled=point.compiled):{wide}} {point.batch:>5} {f'{point.prefill:.4g} s':>10}"
                f" {point.batch * one.length / point.prefill:>10,.0f} {decode:>16}   "
                + (f"{ratio:.2f}" if ratio is not None else "")
            )
    lines += [f"  {one.name}: not measured: {one.reason}" for one in report.failed]
    return "\n".join(lines)

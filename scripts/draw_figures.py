"""What scripts/figures runs: it measures, keeps every run in charts/results.json, and draws charts and page from there.

scripts/figures                                       # measure and draw all of them: about 20 minutes
scripts/figures --only forward,load                   # some of them; results of the others are kept
scripts/figures --from scripts/charts/results.json    # draw again, measure nothing
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_convert
import bench_load
import bench_quantize
import bench_speedup
import click
from big_checkpoints import LLAMA_1B, write
from figure_drawings import DRAWINGS, json_of, page_of

Rows = list[dict[str, Any]]

CHARTS = Path(__file__).parent / "charts"
RESULTS, PAGE = "results.json", "FIGURES.md"
MODEL = LLAMA_1B
LAYERS_ALONE = {**MODEL, "vocab_size": 512}  # 122 MB each, so that the size is that of the layers
CONVERTED = (2, 4, 8, 16, 24)  # layers
RANKS = (1, 2, 4)
_CONVERTS = ("reshard", "dry run", "cp+sync")
_VERSIONS = ("torch", "transformers", "bitsandbytes")


def forward(root: Path, _repeat: int) -> Rows:
    """Seconds of a forward, by engine, ranks, compilation and batch size; as many rounds as there is time for."""
    layers, length, batches = MODEL["num_hidden_layers"], bench_speedup.LENGTH, bench_speedup.BATCHES
    return bench_speedup.measure(root, budget=bench_speedup.BUDGET, layers=layers, length=length, batches=batches)


def convert(root: Path, repeat: int) -> Rows:
    """Seconds of `reshard convert --tp-size 4`, of its start-up and of `cp -r` with `sync`, by size."""
    rows = []
    for layers in CONVERTED:
        case = bench_convert.Case({**LAYERS_ALONE, "num_hidden_layers": layers}, ("--tp-size", "4"))
        _, size, found = bench_convert.measure(case, root=root, repeat=repeat, rest=bench_convert.REST, only=_CONVERTS)
        rows += [{"name": name, "bytes": size, "seconds": _rounded(runs, 3)} for name, runs in found.items()]
    return rows


def load(root: Path, repeat: int) -> Rows:
    """Seconds of a load, after imports, by number of ranks."""
    _, size = write(root / "source", MODEL, filled=True)
    rows = []
    for ranks in RANKS:
        for name, runs in bench_load.measure(root, ranks, repeat).items():
            seconds = _rounded((run["load"] for run in runs), 4)
            rows.append({"name": name, "ranks": ranks, "bytes": size, "seconds": seconds})
    return rows


def quantize(root: Path, repeat: int) -> Rows:
    """Megabytes of bf16 that a core quantizes in a second of processor time, by format and by who does it."""
    _, size = write(root / "source", {**LAYERS_ALONE, "num_hidden_layers": 3}, filled=True)
    rows = []
    for kind in bench_quantize.KINDS:
        found = bench_quantize.measure(kind, root / "source", root / "out", size, repeat)
        for name, (rates, memory) in found.items():
            rows.append({"format": kind, "name": name, "rates": _rounded(rates, 1), "memory": round(memory)})
    return rows


@dataclass(frozen=True)
class Figure:
    """What measures a chart, in an empty folder, and how often everything runs."""

    measure: Callable[[Path, int], Rows]
    repeat: int


FIGURES = {
    "forward": Figure(forward, 1),
    "convert": Figure(convert, 3),
    "load": Figure(load, 3),
    "quantize": Figure(quantize, 2),
}


def _rounded(values: Iterable[float], digits: int) -> list[float]:
    return [round(value, digits) for value in values]


def machine() -> str:
    """Return the number of this machine's CPU cores, and what they are."""
    cores, info = os.cpu_count(), Path("/proc/cpuinfo")
    named = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{cores} CPU core{'s' * (cores != 1)}" + (f" ({named[0]})" if named else "")


def measured(name: str, folder: str | None, repeat: int | None) -> dict[str, Any]:
    """Measure a figure. Returns its rows, and when, on what and with what they were measured."""
    root = Path(tempfile.mkdtemp(dir=folder))
    try:
        rows = FIGURES[name].measure(root, repeat or FIGURES[name].repeat)
    finally:
        shutil.rmtree(root)
    return {
        "command": f"scripts/figures --only {name}" + (f" --repeat {repeat}" if repeat else ""),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "cores": os.cpu_count(),
        "versions": {package: importlib.metadata.version(package) for package in _VERSIONS},
        "rows": rows,
    }


def added(before: Rows, new: Rows) -> Rows:
    """Return the new rows with the runs of the same rows before: of forwards, the run that waited least comes first."""
    there = {_key(row): row for row in before}
    rows = []
    for row in new:
        old = there.get(_key(row), {})
        runs = {key: [*value, *old.get(key, [])] for key, value in row.items() if isinstance(value, list)}
        if "waited" in runs:
            order = sorted(range(len(runs["waited"])), key=runs["waited"].__getitem__)
            runs = {key: [value[at] for at in order] for key, value in runs.items()}
        rows.append({**row, **runs})
    return rows


def _key(row: dict[str, Any]) -> tuple:
    return tuple((key, value) for key, value in row.items() if not isinstance(value, list) and key != "memory")


class Names(click.ParamType):
    """Names of figures, with commas between them."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the names as a tuple; another one is a usage error."""
        names = tuple(value.split(",")) if isinstance(value, str) else value
        for name in names:
            if name not in FIGURES:
                self.fail(f"{name!r} is none of {', '.join(FIGURES)}", param, ctx)
        return names


@click.command()
@click.option("--only", type=Names(), default=",".join(FIGURES), show_default=True, help="Which charts to measure.")
@click.option("--from", "source", type=click.Path(exists=True, dir_okay=False), help="Measure nothing: draw these.")
@click.option("--out", type=click.Path(file_okay=False), default=str(CHARTS), help="Folder of the charts.")
@click.option("--folder", type=click.Path(exists=True, file_okay=False), help="Where to work.  [default: a new one]")
@click.option("--add", "more", is_flag=True, help="Add to the runs that are kept: if other work has disturbed those.")
@click.option("--repeat", type=click.IntRange(1), help="How often everything runs.  [default: 2 or 3]")
def main(
    only: tuple[str, ...], source: str | None, out: str, folder: str | None, more: bool, repeat: int | None
) -> None:
    """Measure charts, keep the results, and draw them with their page."""
    if source and (more or repeat):
        raise click.UsageError("--from measures nothing: --add and --repeat do not go with it")
    there = Path(out)
    there.mkdir(parents=True, exist_ok=True)
    kept = Path(source) if source else there / RESULTS
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in () if source else only:
        click.echo(f"{name} …", err=True)
        found = measured(name, folder, repeat)
        if more and name in results:
            found["rows"] = added(results[name]["rows"], found["rows"])
        results[name] = found
        kept.write_text(json_of(results))  # now: the next one may fail
    for name, found in results.items():
        (there / f"{name}.svg").write_text(DRAWINGS[name].chart(found))
    page = page_of(results)
    (there / PAGE).write_text(page)
    click.echo(page)


if __name__ == "__main__":
    main()

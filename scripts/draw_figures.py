"""What scripts/figures runs: it measures, keeps every run in charts/results.json, and draws the charts from there.

    scripts/figures                                       # measure and draw all of them: about 20 minutes
    scripts/figures --only forward,load                   # some of them; results of the others are kept
    scripts/figures --from scripts/charts/results.json    # draw again, measure nothing

All sides of a chart run in turn, in one run. Charts show medians.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_convert
import bench_load
import bench_quantize
import bench_speedup
import click
from big_checkpoints import LLAMA_1B, write
from charts import Bar, Panel, bars, lines

Rows = list[dict[str, Any]]
Found = Mapping[str, Any]  # what results.json has of a chart

RESULTS = Path(__file__).parent / "charts" / "results.json"
MODEL = LLAMA_1B
LAYERS_ALONE = {**MODEL, "vocab_size": 512}  # 122 MB each, so that the size is that of the layers
CONVERTED = (2, 4, 8, 16, 24)  # layers
RANKS = (1, 2, 4)
_VERSIONS = ("torch", "transformers", "bitsandbytes")
_OURS, _OURS_LIGHT, _THEIRS, _THEIRS_LIGHT, _OTHER = "#3b7ddd", "#9cc3f5", "#d98a1e", "#f0c58a", "#8b8e96"
_FORWARD = {  # colours, by name of the series
    "reshard, 1 rank": _OURS_LIGHT,
    "reshard, 2 ranks": _OURS,
    "transformers, 1 process": _THEIRS_LIGHT,
    "transformers, tp_plan on 2 ranks": _THEIRS,
}
_CONVERT = {  # names of the series and colours, by name in the benchmark
    "reshard": ("reshard convert, the whole process", _OURS),
    "dry run": ("of it start-up: imports and plan", _OTHER),
    "cp+sync": ("cp -r and sync", _THEIRS),
}
_COPY = ("the whole process, less start-up", _OURS_LIGHT)
_LOAD = {
    "reshard": ("reshard", _OURS),
    "reshard, no digests": ("reshard, no digests", _OURS_LIGHT),
    "transformers": ('transformers, tp_plan="auto"', _THEIRS),
}
_QUANTIZE = {
    "reshard": ("reshard: reads, quantizes, digests, writes", _OURS),
    "library": ("the library: only quantizes", _OTHER),
    "transformers": ("transformers: loads quantized, saves", _THEIRS),
}


def measure_forward(root: Path, repeat: int) -> Rows:
    """Seconds of a forward, by engine, ranks, compilation and batch size."""
    layers, length, batches = MODEL["num_hidden_layers"], bench_speedup.LENGTH, bench_speedup.BATCHES
    return bench_speedup.measure(root, budget=bench_speedup.BUDGET, layers=layers, length=length, batches=batches)


def draw_forward(found: Found) -> str:
    """Bars of the speed-up over one rank, in the form of the chart in transformers' guide to tensor parallelism."""
    rows = found["rows"]
    took = {
        (row["engine"], row["ranks"], row["compiled"], row["batch"]): row["seconds"][0]
        for row in rows
        if "seconds" in row
    }
    panels = []
    for compiled, title in ((False, "eager"), (True, "torch.compile")):
        groups: dict[str, dict[str, Bar]] = {}
        for batch in sorted({batch for *_, batch in took}):
            group = groups.setdefault(f"batch {batch}", {})
            for name, (engine, ranks) in zip(_FORWARD, bench_speedup.SIDES):
                seconds = took.get((engine, ranks, compiled, batch))
                if seconds is not None:
                    ratio = took["reshard", 1, False, batch] / seconds
                    group[name] = Bar(ratio, f"{ratio:.2f}", _seconds(seconds))
        panels.append(Panel(title, groups))
    title = f"Llama forward, {rows[0]['length']} tokens, with and without tensor parallelism"
    note = (
        f"{rows[0]['layers']} layers of 1B shape in bf16; {found['machine']}, one thread a rank. In the bars: seconds."
    )
    return bars(title, note, "speed-up over reshard on 1 rank, eager", _FORWARD, panels)


def measure_convert(root: Path, repeat: int) -> Rows:
    """Seconds of `reshard convert --tp-size 4`, of its start-up and of `cp -r` with `sync`, by size."""
    rows = []
    for layers in CONVERTED:
        case = bench_convert.Case({**LAYERS_ALONE, "num_hidden_layers": layers}, ("--tp-size", "4"))
        _, size, found = bench_convert.measure(case, root=root, repeat=repeat, rest=bench_convert.REST, only=_CONVERT)
        rows += [{"name": name, "bytes": size, "seconds": _rounded(runs, 3)} for name, runs in found.items()]
    return rows


def draw_convert(found: Found) -> str:
    """Lines of seconds against size."""
    points: dict[str, list[tuple[float, float]]] = {}
    for size in dict.fromkeys(row["bytes"] for row in found["rows"]):
        took = {row["name"]: statistics.median(row["seconds"]) for row in found["rows"] if row["bytes"] == size}
        named = {_CONVERT[name][0]: seconds for name, seconds in took.items()}
        for name, seconds in {**named, _COPY[0]: took["reshard"] - took["dry run"]}.items():
            points.setdefault(name, []).append((size / 1e9, seconds))
    note = f"Llama layers of 1B shape in bf16, in the page cache, until the disk has everything; {found['machine']}."
    title = "reshard convert --tp-size 4, beside cp"
    return lines(title, note, "GB", "seconds", dict([*_CONVERT.values(), _COPY]), points)


def measure_load(root: Path, repeat: int) -> Rows:
    """Seconds of a load, after imports, by number of ranks."""
    _, size = write(root / "source", MODEL, filled=True)
    rows = []
    for ranks in RANKS:
        for name, runs in bench_load.measure(root, ranks, repeat).items():
            seconds = _rounded((run["load"] for run in runs), 4)
            rows.append({"name": name, "ranks": ranks, "bytes": size, "seconds": seconds})
    return rows


def draw_load(found: Found) -> str:
    """Bars of seconds for each number of ranks."""
    groups: dict[str, dict[str, Bar]] = {}
    for row in found["rows"]:
        seconds, ranks = statistics.median(row["seconds"]), row["ranks"]
        over = f", more than the {found['cores']} cores" if ranks > found["cores"] else ""
        group = groups.setdefault(f"{ranks} rank{'s' * (ranks > 1)}{over}", {})
        group[_LOAD[row["name"]][0]] = Bar(seconds, _seconds(seconds))
    note = f"Llama of 1B shape in bf16, in the page cache; {found['machine']}, one thread a rank."
    title = f"Load of {found['rows'][0]['bytes'] / 1e9:.2f} GB, after imports"
    return bars(title, note, "seconds", dict(_LOAD.values()), [Panel("", groups)])


def measure_quantize(root: Path, repeat: int) -> Rows:
    """Megabytes of bf16 that a core quantizes in a second of processor time, by format and by who does it."""
    _, size = write(root / "source", {**LAYERS_ALONE, "num_hidden_layers": 3}, filled=True)
    rows = []
    for kind in bench_quantize.KINDS:
        found = bench_quantize.measure(kind, root / "source", root / "out", size, repeat)
        for name, (rates, memory) in found.items():
            rows.append({"format": kind, "name": name, "rates": _rounded(rates, 1), "memory": round(memory)})
    return rows


def draw_quantize(found: Found) -> str:
    """Bars of megabytes a second for each format."""
    groups: dict[str, dict[str, Bar]] = {}
    for row in found["rows"]:
        rate = statistics.median(row["rates"])
        groups.setdefault(row["format"], {})[_QUANTIZE[row["name"]][0]] = Bar(rate, f"{rate:.0f}")
    note = f"Llama layers of 1B shape in bf16; {found['machine']}. transformers has no fp8 without a GPU."
    title = "--quantize, beside the libraries whose bytes it makes"
    y = "MB of bf16 a second of processor time"
    return bars(title, note, y, dict(_QUANTIZE.values()), [Panel("", groups)])


@dataclass(frozen=True)
class Figure:
    """A chart: what measures it in an empty folder, what draws it from the rows, and how often all of it runs."""

    measure: Callable[[Path, int], Rows]
    draw: Callable[[Found], str]
    repeat: int


FIGURES = {
    "forward": Figure(measure_forward, draw_forward, 2),
    "convert": Figure(measure_convert, draw_convert, 3),
    "load": Figure(measure_load, draw_load, 3),
    "quantize": Figure(measure_quantize, draw_quantize, 2),
}


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


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
        times = repeat or FIGURES[name].repeat
        rows = FIGURES[name].measure(root, times)
    finally:
        shutil.rmtree(root)
    return {
        "command": f"scripts/figures --only {name}",
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "cores": os.cpu_count(),
        "versions": {package: importlib.metadata.version(package) for package in _VERSIONS},
        "repeat": times,
        "rows": rows,
    }


def json_of(results: Mapping[str, Found]) -> str:
    """Write results as JSON, with a line for each row."""
    text = json.dumps({name: {**found, "rows": []} for name, found in results.items()}, indent=1)
    for found in results.values():
        rows = ",\n".join(f"   {json.dumps(row)}" for row in found["rows"])
        text = text.replace('"rows": []', f'"rows": [\n{rows}\n  ]', 1)
    return text + "\n"


def text_of(name: str, found: Found) -> str:
    """Return a figure's medians as a table, with their range."""
    out = [f"{name}: {found['machine']}, {found['date']}, medians of {found['repeat']}"]
    for row in found["rows"]:
        runs = row.get("seconds") or row.get("rates")
        what = ", ".join(f"{key} {value}" for key, value in row.items() if not isinstance(value, list))
        out.append(f"  {what}" + (f": {statistics.median(runs):g} ({min(runs):g} to {max(runs):g})" if runs else ""))
    return "\n".join(out)


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
@click.option("--only", type=Names(), default=",".join(FIGURES), show_default=True, help="Which charts.")
@click.option("--from", "source", type=click.Path(exists=True, dir_okay=False), help="Draw these results; no runs.")
@click.option("--out", type=click.Path(file_okay=False), default=str(RESULTS.parent), help="Folder of the charts.")
@click.option(
    "--folder", type=click.Path(exists=True, file_okay=False), help="Where to work.  [default: a temporary one]"
)
@click.option("--repeat", type=int, help="How often everything runs.  [default: 2 or 3]")
def main(only: tuple[str, ...], source: str | None, out: str, folder: str | None, repeat: int | None) -> None:
    """Measure and draw the charts; keep the results beside them."""
    there = Path(out)
    there.mkdir(parents=True, exist_ok=True)
    kept = there / RESULTS.name
    results: dict[str, Any] = json.loads(Path(source or kept).read_text()) if source or kept.exists() else {}
    for name in only:
        if source is None:
            results[name] = measured(name, folder, repeat)
            kept.write_text(json_of(results))  # now: the next chart may fail
        elif name not in results:
            continue
        click.echo(text_of(name, results[name]))
        (there / f"{name}.svg").write_text(FIGURES[name].draw(results[name]))


if __name__ == "__main__":
    main()

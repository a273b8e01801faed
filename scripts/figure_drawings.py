"""From the results of scripts/figures to charts, tables and the page charts/FIGURES.md; the same results give the same
bytes. Charts show medians; of the forwards, the run in which ranks waited least for a CPU."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from charts import Bar, Panel, bars, lines

__all__ = ["DRAWINGS", "Drawing", "Found", "json_of", "page_of"]

Found = Mapping[str, Any]  # what results.json has of a chart: its rows, and when and on what they were measured
Table = list[Sequence[str]]  # its first line has the headings

_OURS, _OURS_LIGHT, _THEIRS, _THEIRS_LIGHT, _OTHER = "#3b7ddd", "#9cc3f5", "#d98a1e", "#f0c58a", "#8b8e96"
_FORWARD = {  # names of the series and colours, by engine and ranks
    ("reshard", 1): ("reshard, 1 rank", _OURS_LIGHT),
    ("reshard", 2): ("reshard, 2 ranks", _OURS),
    ("transformers", 1): ("transformers, 1 process", _THEIRS_LIGHT),
    ("transformers", 2): ("transformers, tp_plan on 2 ranks", _THEIRS),
}
_CONVERT = {  # … by name in the benchmark
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


@dataclass(frozen=True)
class Drawing:
    """A chart, its table, and what its page says of both."""

    title: str
    chart: Callable[[Found], str]
    table: Callable[[Found], Table]
    words: str


def _forwards(found: Found) -> dict[tuple[bool, int], dict[tuple[str, int], Mapping[str, Any]]]:
    """Return the rows by whether they were compiled and batch size, then by engine and ranks."""
    rows: dict[tuple[bool, int], dict[tuple[str, int], Mapping[str, Any]]] = {}
    for row in found["rows"]:
        if "seconds" in row:
            rows.setdefault((row["compiled"], row["batch"]), {})[row["engine"], row["ranks"]] = row
    return rows


def forward_chart(found: Found) -> str:
    """Bars of the speed-up over one rank, in the form of the chart in transformers' guide to tensor parallelism."""
    rows = _forwards(found)
    groups: dict[bool, dict[str, dict[str, Bar]]] = {}
    for (compiled, batch), sides in rows.items():
        base = rows[False, batch]["reshard", 1]["seconds"][0]
        groups.setdefault(compiled, {})[f"batch {batch}"] = {
            _FORWARD[side][0]: Bar(base / row["seconds"][0], f"{base / row['seconds'][0]:.2f}", _s(row["seconds"][0]))
            for side, row in sides.items()
        }
    first = found["rows"][0]
    title = f"Llama forward, {first['length']} tokens, with and without tensor parallelism"
    note = f"{first['layers']} layers of 1B shape in bf16; {found['machine']}, one thread a rank. In the bars: seconds."
    y = "speed-up over reshard on 1 rank, eager"
    panels = [Panel("torch.compile" if compiled else "eager", group) for compiled, group in groups.items()]
    return bars(title, note, y, dict(_FORWARD.values()), panels)


def forward_table(found: Found) -> Table:
    """Seconds and speed-up of each batch size, and the most that a rank waited for a CPU."""
    rows = _forwards(found)
    lines: Table = [["", *(name for name, _ in _FORWARD.values()), "waited, at most"]]
    for (compiled, batch), sides in rows.items():
        base = rows[False, batch]["reshard", 1]["seconds"][0]
        cells = [
            f"{_runs(sides[side]['seconds'], sides[side]['seconds'][0])}, {base / sides[side]['seconds'][0]:.2f} ×"
            if side in sides
            else ""
            for side in _FORWARD
        ]
        waited = max(row["waited"][0] for row in sides.values())
        lines.append([f"batch {batch}{', compiled' * compiled}", *cells, f"{waited:.0%}"])
    return lines


def convert_chart(found: Found) -> str:
    """Lines of seconds against size."""
    points: dict[str, list[tuple[float, float]]] = {}
    for size, took in _by(found, "bytes", "seconds").items():
        median = {name: _median(runs) for name, runs in took.items()}
        named = {_CONVERT[name][0]: seconds for name, seconds in median.items()}
        for name, seconds in {**named, _COPY[0]: median["reshard"] - median["dry run"]}.items():
            points.setdefault(name, []).append((size / 1e9, seconds))
    note = f"Llama layers of 1B shape in bf16, in the page cache, until the disk has everything; {found['machine']}."
    title = "reshard convert --tp-size 4, beside cp"
    return lines(title, note, "GB", "seconds", dict([*_CONVERT.values(), _COPY]), points)


def convert_table(found: Found) -> Table:
    """Seconds of each size, and the ratio of what follows start-up to the copy."""
    rows: Table = [["GB", *(name for name, _ in _CONVERT.values()), _COPY[0], "… over cp -r and sync"]]
    for size, took in _by(found, "bytes", "seconds").items():
        copy = round(_median(took["reshard"]) - _median(took["dry run"]), 2) + 0.0  # not -0.00
        cells = [_runs(took[name]) for name in _CONVERT]
        ratio = copy / _median(took["cp+sync"])
        rows.append([f"{size / 1e9:.2f}", *cells, _s(copy), f"{ratio:.2f}"])
    return rows


def load_chart(found: Found) -> str:
    """Bars of seconds for each number of ranks."""
    groups = {
        f"{ranks} rank{'s' * (ranks > 1)}{', more than the cores' * (ranks > found['cores'])}": {
            _LOAD[name][0]: Bar(_median(runs), _s(_median(runs))) for name, runs in took.items()
        }
        for ranks, took in _by(found, "ranks", "seconds").items()
    }
    note = f"Llama of 1B shape in bf16, in the page cache; {found['machine']}, one thread a rank."
    title = f"Load of {found['rows'][0]['bytes'] / 1e9:.2f} GB, after imports"
    return bars(title, note, "seconds", dict(_LOAD.values()), [Panel("", groups)])


def load_table(found: Found) -> Table:
    """Seconds of each number of ranks."""
    rows: Table = [["ranks", *(name for name, _ in _LOAD.values())]]
    for ranks, took in _by(found, "ranks", "seconds").items():
        rows.append([str(ranks), *(_runs(took[name]) if name in took else "" for name in _LOAD)])
    return rows


def quantize_chart(found: Found) -> str:
    """Bars of megabytes a second for each format."""
    groups = {
        kind: {_QUANTIZE[name][0]: Bar(_median(runs), f"{_median(runs):.0f}") for name, runs in rates.items()}
        for kind, rates in _by(found, "format", "rates").items()
    }
    note = f"Llama layers of 1B shape in bf16; {found['machine']}. transformers has no fp8 without a GPU."
    title = "--quantize, beside the libraries whose bytes it makes"
    y = "MB of bf16 a second of processor time"
    return bars(title, note, y, dict(_QUANTIZE.values()), [Panel("", groups)])


def quantize_table(found: Found) -> Table:
    """Megabytes a second and megabytes of memory of each format."""
    rows: Table = [["`--quantize`", *(name for name, _ in _QUANTIZE.values())]]
    rates, memory = _by(found, "format", "rates"), _by(found, "format", "memory")
    for kind, by_name in rates.items():
        cells = [
            f"{_median(by_name[name]):.0f} MB/s ({min(by_name[name]):.0f}–{max(by_name[name]):.0f}),"
            f" {memory[kind][name]} MB"
            if name in by_name
            else ""
            for name in _QUANTIZE
        ]
        rows.append([f"`{kind}`", *cells])
    return rows


DRAWINGS = {
    "forward": Drawing(
        "Forward",
        forward_chart,
        forward_table,
        "Seconds of a forward of each batch size, with the range of all runs where there were several, and the speed-up"
        " over one rank of `reshard`, eager. The last column is the largest share of these forwards in which a rank was"
        " ready to run and had no CPU, since other processes had them.",
    ),
    "convert": Drawing(
        "Convert", convert_chart, convert_table, "Seconds until the disk has everything, by size: median and range."
    ),
    "load": Drawing(
        "Load",
        load_chart,
        load_table,
        "Seconds of a load, after imports: median and range.",
    ),
    "quantize": Drawing(
        "Quantize",
        quantize_chart,
        quantize_table,
        "Megabytes of bf16 a second of processor time, median and range, and the peak of memory over the imports.",
    ),
}


def page_of(results: Mapping[str, Found]) -> str:
    """Write the page: each chart with its table, its command, and when and on what it was measured."""
    parts = [
        "# Figures\n\nWritten by `scripts/figures`, from [results.json](results.json), which has every run."
        " All sides of a chart ran in turn, in one run.\n"
    ]
    for name, drawing in DRAWINGS.items():
        if name in results:
            found = results[name]
            with_ = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
            failed = [
                f"\nNot measured: {_FORWARD[row['engine'], row['ranks']][0]}{', compiled' * row['compiled']}:"
                f" {row['error']}\n"
                for row in found["rows"]
                if "error" in row
            ]
            parts.append(
                f"## {drawing.title}\n\n![{drawing.title.lower()}]({name}.svg)\n\n`{found['command']}` on"
                f" {found['date']}, {found['machine']}, {with_}. {drawing.words}\n\n{_markdown(drawing.table(found))}"
                + "".join(failed)
            )
    return "\n".join(parts)


def json_of(results: Mapping[str, Found]) -> str:
    """Write results as JSON, with a line for each row."""
    text = json.dumps({name: {**found, "rows": []} for name, found in results.items()}, indent=1)
    for found in results.values():
        rows = ",\n".join(f"   {json.dumps(row)}" for row in found["rows"])
        text = text.replace('"rows": []', f'"rows": [\n{rows}\n  ]', 1)
    return text + "\n"


def _by(found: Found, key: str, value: str) -> dict[Any, dict[str, Any]]:
    """Return a value of each row by `key` and name."""
    rows: dict[Any, dict[str, Any]] = {}
    for row in found["rows"]:
        rows.setdefault(row[key], {})[row["name"]] = row[value]
    return rows


def _median(runs: Iterable[float]) -> float:
    return statistics.median(runs)


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def _runs(runs: Sequence[float], shown: float | None = None) -> str:
    """Write seconds, by default the median, with the range of the runs if there are several."""
    middle = _s(_median(runs) if shown is None else shown)
    low, high = (_s(bound).removesuffix(" s") for bound in (min(runs), max(runs)))
    return middle if len(runs) == 1 else f"{middle} ({low}–{high})"


def _markdown(table: Table) -> str:
    head, *rows = table
    drawn = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in drawn)

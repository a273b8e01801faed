"""The benchmarks run and print every named figure, at a size that makes the figures meaningless. scripts/figures runs
so, too; and the charts in the repository are those of its results."""

from __future__ import annotations

import json
import re
import signal
import sys
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

import bench_convert
import bench_device
import bench_forward
import bench_hub
import bench_like
import bench_load
import bench_native
import bench_overhead
import bench_plan
import bench_quantize
import bench_sequence
import bench_speedup
import bench_startup
import draw_figures
import pytest
import rehearse_parts
import warm_commands
from big_checkpoints import LLAMA_1B
from charts import Bar, Panel, bars, lines
from click import Choice, Command
from click.testing import CliRunner
from places import ROOT

slow = partial(pytest.param, marks=pytest.mark.slow)

SVG = "{http://www.w3.org/2000/svg}"
COLOURS = {"one": "#111111", "<b>two": "#222222"}

SMALL = {
    **LLAMA_1B,
    **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
}


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the benchmarks start is forked, and nothing is compiled: only how long it takes is another."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setattr(sys, "executable", warm_commands.python())
    for module in (bench_convert, bench_hub, bench_like, bench_quantize):
        monkeypatch.setattr(module, "RESHARD", [sys.executable, *module.RESHARD[1:]])


def run(command: Command, *arguments: str) -> str:
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.mark.parametrize(
    ("module", "arguments", "rows"),
    [
        (bench_load, ["--repeat", "1", "--layers", "2"], ["reshard", "reshard, no digests", "transformers"]),
        (
            bench_forward,
            ["--repeat", "1", "--layers", "2", "--length", "4", "--steps", "2"],
            ["reshard tp 1", "reshard tp 2", "transformers tp 2"],
        ),
        (
            bench_speedup,
            ["--budget", "0", "--layers", "1", "--length", "4", "--batch", "1"],
            [f"{engine} tp {ranks}{mode}" for engine, ranks in bench_speedup.SIDES for mode in ("", ", compiled")],
        ),
        slow(
            bench_native,
            ["--repeat", "1", "--layers", "1", "--length", "8", "--steps", "2", "--ranks", "1"],
            [
                *("bf16, 1 ranks", "bf16, transformers, one process", "nf4, native, 1 ranks"),
                *("nf4, dequantised, 1 ranks", "int8, native, 1 ranks", "int8, transformers, one process"),
            ],
        ),
        slow(bench_overhead, ["--repeat", "1"], ["unsharded", "reshard", "transformers"]),
        slow(bench_sequence, ["--repeat", "1", "--length", "32"], ["whole", "split"]),
        (
            bench_device,
            ["--repeat", "1", "--layers", "2", "--device", "cpu"],
            ["pinned copy", "reshard", "reshard, no digests", "load_file"],
        ),
    ],
)
def test_a_benchmark_of_the_runtime(
    module: object, arguments: list[str], rows: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LLAMA_1B", SMALL)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    output = run(module.main, *arguments)  # type: ignore[attr-defined]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers  # torchrun sets its own
    for row in rows:
        assert re.search(rf"^  {row}  .*\d", output, re.MULTILINE), output


def test_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_like, "LLAMA_1B", SMALL)
    said = run(bench_like.main, "--repeat", "1", "--rest", "0", "--layers", "2")
    for what in bench_like.CHANGED:
        assert re.search(rf"^{what} changed, .* GB: fresh [\d.]+ s, like [\d.]+ s \(× [\d.]+\)", said, re.M), said


def test_the_benchmark_of_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench_convert.Case(SMALL, ("--tp-size", "2"))
    cold = bench_convert.Case(SMALL, ("--tp-size", "2", "--dtype", "float16"), cold=True, cut_before=4)
    monkeypatch.setattr(bench_convert, "CASES", {"dense tp2": case, "dense cold": cold})
    output = run(bench_convert.main, "--repeat", "1", "--rest", "0", "--peers")
    first, second = output.split("dense cold")
    ours = ["cp", r"cp\+sync", "dry run", "reshard", "reshard --no-sync", "copy, --no-sync", "whole process"]
    for text, rows in ((first, [*ours, "load and split", r"transformers \+ DCP"]), (second, ours)):
        for row in rows:
            assert re.search(rf"^  {row}  .*\d", text, re.MULTILINE), output


def test_the_benchmark_of_quantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_quantize, "MODEL", SMALL)
    output = run(bench_quantize.main, "--repeat", "1", "--layers", "1", "--kind", "nf4")
    for row in ("reshard", "library", "transformers"):
        assert re.search(rf"^  {row} +\d+ MB/s a core +-?\d+ MB above the imports$", output, re.MULTILINE), output


def test_the_benchmark_of_start_up() -> None:
    output = run(bench_startup.main, "--repeat", "1", "--beside", str(ROOT), "--only", "tp2 to tp4")
    assert re.fullmatch(r"  convert tp2 to tp4  .* here .* s cpu .* s wall  beside .* s wall  .* × .* ×\n", output)


def test_the_benchmark_of_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_plan, "MODELS", {"small": (SMALL, 2)})
    monkeypatch.setattr(bench_plan, "CASES", (("small", {"tp_size": 2}),))
    assert re.search(r"^small +\d+  tp_size 2 .* \d+ MiB$", run(bench_plan.main, "--repeat", "1"), re.MULTILINE)


def test_the_rehearsal_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each half of the layers halves what a part writes; a narrow model is converted in earnest."""
    sizes = {"tp_size": 4}
    cases = {
        "holes": rehearse_parts.Case({**SMALL, "num_hidden_layers": 8}, 2, sizes),
        "narrow": rehearse_parts.Case(SMALL, 2, sizes, holes=False),
    }
    monkeypatch.setattr(rehearse_parts, "CASES", cases)
    monkeypatch.setattr(rehearse_parts, "MANY", {"ranks": 3, "tensors": 50})
    main = rehearse_parts.main
    monkeypatch.setattr(main.params[0], "type", Choice(list(cases)))
    holes = run(main, "--parts", "2", "--layers", "1,2", "--model", "holes")
    narrow = run(main, "--parts", "2", "--layers", "1", "--model", "narrow", "--no-many")
    for row, *_ in rehearse_parts.ROWS:
        assert re.search(rf"^  {re.escape(row)}  +[\d,.]+$", narrow, re.MULTILINE), (row, narrow)
        assert re.search(rf"^  {re.escape(row)}  +[\d,.]+ +[\d,.]+ ", holes, re.M) or "journal" in row, (row, holes)
    assert re.search(r"^  draft of a part, MB .* 0\.[4-6]\d×$", holes, re.MULTILINE), holes
    assert re.search(r"^many tensors: 3 ranks of 50 tensors\n  manifest, MB ", holes, re.MULTILINE)
    assert narrow.endswith("every byte as one convert writes it: yes\n")


def test_the_benchmark_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_hub, "LLAMA_1B", SMALL)
    output = run(bench_hub.main, "--repeat", "1", "--layers", "1", "--rate", "50")
    for row in ("download alone", "convert a local folder", "convert from the Hub"):
        assert re.search(rf"^  {row}  .*\d", output, re.MULTILINE), output
    assert "× the longer of the two" in output


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that scripts/figures measures is small."""
    for name, value in {"MODEL": SMALL, "LAYERS_ALONE": SMALL, "CONVERTED": (1, 2), "RANKS": (1, 2)}.items():
        monkeypatch.setattr(draw_figures, name, value)
    for name, value in {"LLAMA_1B": SMALL, "LENGTH": 4, "BATCHES": (1, 2), "BUDGET": 0}.items():
        monkeypatch.setattr(bench_speedup, name, value)
    monkeypatch.setattr(bench_speedup, "SIDES", (("reshard", 1), ("reshard", 2), ("transformers", 2)))
    monkeypatch.setattr(bench_load, "KINDS", {"reshard": "out", "transformers": "source"})
    monkeypatch.setattr(bench_quantize, "KINDS", ("nf4",))
    monkeypatch.setattr(bench_convert, "REST", 0)


def test_all_figures(small: None, tmp_path: Path) -> None:
    """Each chart has a bar for every median that its rows give, and is drawn alike from the results alone."""
    run(draw_figures.main, "--repeat", "1", "--out", str(tmp_path / "new"))
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    rows = {name: found["rows"] for name, found in results.items()}
    assert {name: len(there) for name, there in rows.items()} == {"forward": 12, "convert": 6, "load": 4, "quantize": 3}
    runs = [row.get("seconds") or row["rates"] for there in rows.values() for row in there]
    assert all(one > 0 for row in runs for one in row)
    for name in ("forward", "load", "quantize"):
        drawn = ElementTree.parse(tmp_path / "new" / f"{name}.svg").findall(f"{SVG}text[@class='value']")
        assert len(drawn) == len(rows[name])
    run(draw_figures.main, "--from", str(tmp_path / "new" / "results.json"), "--out", str(tmp_path / "again"))
    drawn_again = {name: text for name, text in contents(tmp_path / "new").items() if name != "results.json"}
    assert contents(tmp_path / "again") == drawn_again


def test_only_some(small: None, tmp_path: Path) -> None:
    """Results of the others are kept; a name that is none is a usage error, before anything is measured."""
    found = json.loads((draw_figures.CHARTS / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(found))
    run(draw_figures.main, "--only", "quantize", "--repeat", "1", "--out", str(tmp_path))
    after = json.loads((tmp_path / "results.json").read_text())
    assert {name: after[name] == found[name] for name in found} == {name: name != "quantize" for name in found}
    assert after["quantize"]["command"] == "scripts/figures --only quantize --repeat 1"
    done = CliRunner().invoke(draw_figures.main, ["--only", "load,speed"])
    assert (done.exit_code, "'speed' is none of forward, convert, load, quantize" in done.output) == (2, True)


def test_rounds_are_added() -> None:
    """Of all runs of a forward, the one that waited least comes first; another row is no part of it."""
    old = [{"batch": 1, "seconds": [3.0, 4.0], "waited": [0.1, 0.3]}, {"batch": 2, "seconds": [9.0], "waited": [0.0]}]
    new = [{"batch": 1, "seconds": [5.0], "waited": [0.2]}, {"batch": 4, "seconds": [1.0], "waited": [0.5]}]
    first, second = draw_figures.added(old, new)
    assert first == {"batch": 1, "seconds": [3.0, 5.0, 4.0], "waited": [0.1, 0.2, 0.3]}
    assert second == new[1]
    one = draw_figures.added([{"name": "a", "memory": 3, "rates": [1.0]}], [{"name": "a", "memory": 4, "rates": [2.0]}])
    assert one == [{"name": "a", "memory": 4, "rates": [2.0, 1.0]}]


def test_charts_are_those_of_the_results(tmp_path: Path) -> None:
    """So is the page, and every chart that another page shows is there."""
    run(draw_figures.main, "--from", str(draw_figures.CHARTS / "results.json"), "--out", str(tmp_path))
    kept = contents(draw_figures.CHARTS)
    del kept["results.json"]
    assert contents(tmp_path) == kept, "run: scripts/figures --from scripts/charts/results.json"
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", kept["FIGURES.md"].decode())) == set(kept) - {"FIGURES.md"}
    assert set(kept) == {"FIGURES.md", *(f"{name}.svg" for name in draw_figures.FIGURES)}


def test_bars_are_as_tall_as_their_values() -> None:
    groups = {"a": {"one": Bar(3, "3"), "<b>two": Bar(1.5, "1.5")}, "b & c": {"one": Bar(0.75, "0.75")}}
    text = bars("<title>", "note", "y", COLOURS, [Panel("all", groups)])
    drawn = ElementTree.fromstring(text)
    legend = 2
    tall = [float(box.get("height")) for box in drawn.findall(f"{SVG}rect") if box.get("fill") in COLOURS.values()]
    assert [height / tall[legend] for height in tall[legend:]] == pytest.approx([1, 0.5, 0.25], abs=0.01)
    assert drawn.find(f"{SVG}title").text == "<title>"
    assert {"<b>two", "b & c"} <= {words.text for words in drawn.iter(f"{SVG}text")}


def test_lines_go_from_zero_up() -> None:
    points = {"one": [(1, 2), (2, 4), (4, 8)], "<b>two": [(2, 1)]}
    drawn = ElementTree.fromstring(lines("t", "n", "x", "y", COLOURS, points))
    one, two = (
        [tuple(map(float, at.split(","))) for at in line.get("points").split()] for line in drawn.iter(f"{SVG}polyline")
    )
    zero = [float(line.get("y1")) for line in drawn.findall(f"{SVG}line[@class='axis']")]
    assert zero == [zero[0]]
    assert [zero[0] - y for _, y in one] == pytest.approx(
        [(zero[0] - two[0][1]) * times for times in (2, 4, 8)], abs=0.5
    )
    assert (one[2][0] - one[1][0]) == pytest.approx(2 * (one[1][0] - one[0][0]), abs=0.3)

"""The benchmarks run and print every named figure, at a size that makes the figures meaningless."""

from __future__ import annotations

import re
import signal
import sys
from functools import partial

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
import bench_startup
import pytest
import rehearse_parts
import warm_commands
from big_checkpoints import LLAMA_1B
from click import Choice, Command
from click.testing import CliRunner
from places import ROOT

slow = partial(pytest.param, marks=pytest.mark.slow)

SMALL = {
    **LLAMA_1B,
    **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
}


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the benchmarks start is forked: only how long it takes is another."""
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

"""`bench`: its measurements at two TP sizes, its summary and drawing, and its refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pico
import pytest
import warm_commands
from cli_tools import flip

import reshard
from reshard.errors import UsageError
from reshard.launch.benchmark import runs as bench_runs
from reshard.launch.benchmark.chart import check_chart, draw
from reshard.launch.benchmark.measured import Measured, Point
from reshard.launch.benchmark.runs import Failed, Job, in_turn, label, report_of, run_jobs, summary
from reshard.launch.benchmark.start import draw_report

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="charts need the extra [bench]"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, and its folders for one rank and for two."""
    root = tmp_path_factory.mktemp("bench")
    pico.save("llama", root / "source")
    for ranks in (1, 2):
        reshard.convert(root / "source", root / f"tp{ranks}", tp_size=ranks, sync=False)
    return root


RESHARD = ("-m", "reshard")


def bench(*arguments: object, launcher: tuple[str, ...] = RESHARD) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [warm_commands.python(), *launcher, "bench", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def check_point(point: dict[str, Any], length: int, *, decodes: bool = True) -> None:
    assert 0 < point["prefill_seconds"] < 60
    rate = point["batch"] * length / point["prefill_seconds"]
    assert point["prefill_tokens_per_second"] == pytest.approx(rate)
    assert (point["decode_tokens_per_second"] or 0) > 0 if decodes else point["decode_tokens_per_second"] is None


@needs_matplotlib
def test_two_degrees_another_engine_and_a_chart(root: Path, tmp_path: Path) -> None:
    plot = tmp_path / "speed-up.svg"
    done = bench(
        *(root / "tp1", root / "tp2", "--batch", "2,1", "--length", 512, "--steps", 2, "--repeat", 1),
        *("--against", "tensor_parallel", "--source", root / "source"),
        *("--plot", plot, "--format", "json"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["repeat"], report["base"]) == (1, "reshard tp 1")
    series = {one["name"]: one for one in report["series"]}
    assert list(series)[:2] == ["reshard tp 1", "reshard tp 2"]
    for name, one in series.items():
        assert (one["model"], one["dtype"], one["device"], one["threads"]) == ("LlamaForCausalLM", "float32", "cpu", 1)
        assert one["length"] == 62  # of the model's 64 positions
        assert 0 < one["load"] < one["first_token"] < 120
        assert 50 << 20 < one["memory"] < 4 << 30
        assert [point["batch"] for point in one["points"]] == [1, 2]
        for point in one["points"]:
            check_point(point, 62)
            base = next(p for p in series["reshard tp 1"]["points"] if p["batch"] == point["batch"])
            assert point["speed_up"] == pytest.approx(base["prefill_seconds"] / point["prefill_seconds"])
        assert bool(one["parts"]) == name.startswith("reshard")
    assert sum(series["reshard tp 2"]["parts"].values()) <= series["reshard tp 2"]["load"]
    if importlib.util.find_spec("tensor_parallel") is None:
        assert [one["name"] for one in report["failed"]] == ["tensor_parallel tp 1", "tensor_parallel tp 2"]
        assert all("cannot be imported" in one["reason"] for one in report["failed"])
    picture = plot.read_text()
    assert "<svg" in picture
    for words in (*series, "batch size", "speed-up over one rank"):
        assert f"<!-- {words} -->" in picture  # matplotlib writes each text into a comment


def test_one_folder_under_torchrun(root: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "runtime")
    done = bench(root / "tp2", "--batch", 1, "--length", 8, "--steps", 0, launcher=torchrun)
    assert done.returncode == 0, done.stderr
    assert "reshard tp 2" in done.stdout
    assert "prompts of 8 tokens" in done.stdout
    assert "tokens/s  " in done.stdout
    assert done.stdout.count("MiB") == 1  # only one rank prints


@pytest.mark.slow
def test_compiled(root: Path) -> None:
    done = bench(root / "tp2", "--batch", 1, "--length", 8, "--repeat", 1, "--compile", "--format", "json")
    assert done.returncode == 0, done.stderr
    eager, compiled = json.loads(done.stdout)["series"]
    assert (eager["name"], compiled["name"]) == ("reshard tp 2", "reshard tp 2, compiled")
    assert eager["points"][0]["decode_tokens_per_second"] != compiled["points"][0]["decode_tokens_per_second"]
    check_point(eager["points"][0], 8)
    check_point(compiled["points"][0], 8)


def test_an_encoder_decodes_nothing(tmp_path: Path) -> None:
    from unplanned import UNPLANNED, unplanned

    unplanned("bert").save_pretrained(tmp_path / "source")
    reshard.convert(tmp_path / "source", tmp_path / "out", tp_size=1, tp_plan=UNPLANNED["bert"][2], sync=False)
    done = bench(tmp_path / "out", "--batch", 1, "--length", 8, "--repeat", 1, "--format", "json")
    assert done.returncode == 0, done.stderr
    (series,) = json.loads(done.stdout)["series"]
    check_point(series["points"][0], 8, decodes=False)


def test_a_damaged_folder_is_said_once(root: Path, tmp_path: Path) -> None:
    reshard.convert(root / "source", tmp_path / "out", tp_size=1, sync=False)
    flip(tmp_path / "out" / "shard-00001-model-00001-of-00001.safetensors", -1)
    done = bench(tmp_path / "out", "--batch", 1, "--length", 8)
    assert done.returncode == 4
    assert done.stdout == ""
    assert len(re.findall(r"^Error: ", done.stderr, re.M)) == 1
    assert "lm_head.weight was altered" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--against", "transformers"], "--source SOURCE"),
        (["--against", "transformers", "--source", "./nofolder"], "nofolder"),
        (["--batch", "0,1"], "is not a list of batch sizes"),
        (["--plot", "chart.txt"], "charts are drawn as .png, .svg, .pdf"),
        (["--plot", "nowhere/chart.png"], "no such folder"),
    ],
)
def test_refused_before_anything_is_measured(arguments: list[str], words: str, root: Path) -> None:
    done = bench(root / "tp1", *arguments)
    assert done.returncode == (3 if "nofolder" in words else 2)
    assert words in done.stderr
    assert done.stdout == ""


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="not installed") as caught:
        check_chart("chart.png")
    assert caught.value.hint == "pip install 'reshard[bench]'"


def measured(ranks: int, prefill: float, *, engine: str = "reshard", **more: Any) -> Measured:
    points = tuple(Point(batch, False, prefill * batch, prefill / 10) for batch in (1, 4))
    fixed = {"model": "Llama", "dtype": "bfloat16", "device": "cpu", "threads": 1, "length": 512, "load": 1.0}
    return Measured(
        **{**fixed, "engine": engine, "ranks": ranks, "parts": {"read": 0.5}, "first_token": 2.0, "memory": 1 << 30}
        | {"points": points, **more}
    )


def test_medians_and_speed_ups() -> None:
    one = [measured(1, seconds) for seconds in (9.0, 8.0, 1.0)]
    two = [measured(2, seconds, memory=size << 20) for seconds, size in ((4.0, 1), (2.0, 3), (5.0, 2))]
    other = [measured(2, 16.0, engine="transformers", parts={})]
    report = report_of([two, other, one], (Failed("tensor_parallel tp 2", "no"),))
    assert report.base == one[1]
    assert report.lines() == {
        "reshard tp 2": [(1, 2.0), (4, 2.0)],
        "transformers tp 2": [(1, 0.5), (4, 0.5)],
        "reshard tp 1": [(1, 1.0), (4, 1.0)],
    }
    assert report.measured[0].memory == 3 << 20
    point = report.to_json()["series"][0]["points"][1]
    assert point["decode_tokens_per_second"] == 4 / 0.4
    text = summary(report)
    assert "reshard tp 2" in text
    assert "2.00" in text
    assert "tensor_parallel tp 2: not measured: no" in text


def test_folders_of_one_degree_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"a/tp2": 2, "b/tp2": 2, "c/other": 2, "c/tp4": 4}

    def found(out: str, _: object) -> Any:
        return SimpleNamespace(world_size=sizes[out], bundles=())

    def run(job: Job, *_: object) -> Measured | str:
        return measured(sizes[job.out], 1.0) if job.engine == "reshard" else "no"

    monkeypatch.setattr(bench_runs, "look_at_folder", found)
    monkeypatch.setattr(bench_runs, "_run", run)
    jobs = [Job("reshard", out) for out in (*sizes, "a/tp2")] + [Job("another", "a/tp2"), Job("another", "c/tp4")]
    report = run_jobs(jobs, [], 2)
    names = ["reshard tp 2 (a/tp2)", "reshard tp 2 (b/tp2)", "reshard tp 2 (other)", "reshard tp 4"]
    assert list(report.lines()) == names
    assert [one["name"] for one in report.to_json()["series"]] == names
    assert [one.name for one in report.failed] == ["another tp 2", "another tp 4"]
    assert all(name in summary(report) for name in names)


def test_rounds_run_every_contender_in_turn() -> None:
    order: list[str] = []
    found = in_turn(2, {name: lambda name=name: order.append(name) for name in "ab"})  # type: ignore[misc]
    assert order == ["a", "b", "a", "b"]
    assert {name: len(results) for name, results in found.items()} == {"a": 2, "b": 2}


@needs_matplotlib
def test_the_lines_of_the_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of([[measured(1, 8.0)], [measured(2, 4.0)], [measured(4, 2.0)]])
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        "reshard.launch.benchmark.start.draw", lambda path, *words, **ticks: drawn.update(words=words, **ticks)
    )
    draw_report(report, str(tmp_path / "chart.png"))
    title, x, y, lines = drawn["words"]
    assert (x, y) == ("batch size", "speed-up over one rank")
    assert "512 tokens" in title
    assert [points[0][1] for points in lines.values()] == [1.0, 2.0, 4.0]
    assert drawn["ticks"] == [1, 4]
    draw(str(tmp_path / "chart.png"), *drawn["words"], ticks=drawn["ticks"])
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_what_computes_with_quantized_weights_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that has none is measured once."""

    def found(out: str, _: object) -> Any:
        return SimpleNamespace(world_size=2, bundles=(1,) if out == "nf4" else ())

    ran: list[Job] = []

    def run(job: Job, *_: object) -> Measured:
        ran.append(job)
        return measured(2, 1.0)

    monkeypatch.setattr(bench_runs, "look_at_folder", found)
    monkeypatch.setattr(bench_runs, "_run", run)
    jobs = [Job("reshard", out, compute) for compute in ("native", "dequantised") for out in ("nf4", "plain")]
    report = run_jobs(jobs, [], 1)
    assert [label(one) for one in report.measured] == [
        "reshard tp 2 (nf4), native",
        "reshard tp 2 (plain)",
        "reshard tp 2 (nf4), dequantised",
    ]
    assert len(ran) == 3
    [only] = run_jobs(jobs[:1], [], 1).measured
    assert label(only) == "reshard tp 2"

"""The command line from outside: results, help and usage errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from cli_tools import (
    ESCAPED,
    EVIL,
    RANK_FILES,
    Cli,
    assert_no_controls,
    assert_one_error,
    convert,
    first_file,
    flip,
    single_file,
    tree,
)
from safetensors.torch import load_file

import reshard.cli.main
import reshard.execution.executor
import reshard.operations.plan

COMMANDS = ["convert", "plan", "inspect", "verify", "merge", "run", "check", "bench", "publish", "pull", "env"]


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["convert", "source"], "OUT"),
        (["convert", "source", "out"], "--tp-size"),
        (["convert", "source", "out", "--tp-size", "0"], "--tp-size"),
        (["convert", "source", "out", "--tp-size", "two"], "--tp-size"),
        (["convert", "source", "out", "--tp-size", "2", "--workers", "0"], "--workers"),
        (["convert", "source", "out", "--tp-size", "2", "--dtype", "int4"], "--dtype"),
        (["convert", "source", "out", "--tp-size", "2", "--format", "xml"], "--format"),
        (["plan", "source", "--tp-size", "2", "--gpu-memory", "24GB"], "--tp-size"),
        (["plan", "source", "--utilization", "1.5"], "--utilization"),
        (["plan", "source", "--kv-dtype", "int3"], "--kv-dtype"),
        (["verify"], "OUT"),
        (["publish", "out"], "REPO"),
        (["pull", "org/model", "--ranks", "3-"], "--ranks"),
        (["inspect", "out", "--nope"], "--nope"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_usage_errors(arguments: list[str], mention: str, cli: Cli, tmp_path: Path) -> None:
    result = cli(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err
    assert len([line for line in result.err.splitlines() if line.startswith("Error: ")]) == 1
    assert mention in result.error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, cli: Cli) -> None:
    result = cli(command, "--help")
    assert (result.code, result.err) == (0, "")
    assert "Example" in result.out
    assert f"reshard {command} " in result.out.split("Example")[1]


def test_help_and_version(cli: Cli) -> None:
    result = cli("--help")
    assert (result.code, result.err) == (0, "")
    assert "reshard convert " in result.out
    assert all(f"  {command} " in result.out for command in COMMANDS)
    assert cli("--version").out.strip().endswith(reshard.__version__)


def test_verbose_shows_the_traceback(source: Path, out: Path, tmp_path: Path, cli: Cli) -> None:
    first_file(source).unlink()
    result = cli("-v", *convert(source, out))
    assert result.code == 3
    assert "Traceback (most recent call last)" in result.err
    assert first_file(source).name in result.error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_unexpected_failure_is_one_line(
    source: Path, out: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(f"a {EVIL} surprise")

    monkeypatch.setattr(reshard.operations.plan, "plan_layouts", fail)
    result = cli(*convert(source, out))
    assert result.code == 1
    assert "Traceback" not in result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    assert_no_controls(result)
    assert [line.partition(" ")[0] for line in result.err.splitlines()] == ["Error:", "Hint:"]


def test_plan(source: Path, cli: Cli, tmp_path: Path) -> None:
    before = tree(tmp_path)
    result = cli("plan", source, "--tp-size", 2, "--format", "json")
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)
    assert report["world_size"] == 2
    assert report["architecture"] == "LlamaForCausalLM"
    assert sum(row["count"] for row in report["parameters"]) == 21
    assert report["disk_bytes"] == sum(report["rank_bytes"]) > sum(p.stat().st_size for p in source.glob("*.safe*"))
    whole = [row for row in report["parameters"] if row["placement"] == "Replicate()"]
    assert all(row["reason"] for row in whole)
    assert report["replicated_bytes"] == sum(row["count"] * math.prod(row["shape"]) * 4 for row in whole) > 0
    assert [size for size, why in report["tp_sizes"].items() if why is None] == list("12345678")
    assert report["unused"] == report["dropped"] == report["runtime_only"] == []
    text = cli("plan", source, "--tp-size", 2)
    assert (text.code, text.err) == (0, "")
    assert "legal tp sizes: 1–8\n" in text.out
    assert tree(tmp_path) == before


@pytest.mark.parametrize("style", ["text", "json"])
def test_dry_run_is_the_plan(style: str, source: Path, out: Path, cli: Cli, tmp_path: Path) -> None:
    options = ["--dtype", "bfloat16", "--drop-unused", "--format", style]
    before = tree(tmp_path)
    result = cli(*convert(source, out, "--dry-run", *options))
    assert result.code == 0
    assert result == cli("plan", source, "--tp-size", 2, *options)
    assert tree(tmp_path) == before


def test_convert_inspect_verify(source: Path, out: Path, tmp_path: Path, cli: Cli) -> None:
    before = tree(source)
    planned = json.loads(cli("plan", source, "--tp-size", 2, "--format", "json").out)
    results = {
        "convert": cli(*convert(source, out, "--format", "json")),
        "inspect": cli("inspect", out, "--format", "json"),
        "verify": cli("verify", out, "--format", "json"),
    }
    assert {name: (result.code, result.err) for name, result in results.items()} == dict.fromkeys(results, (0, ""))
    converted, inspected, verified = (json.loads(result.out) for result in results.values())
    sizes = [(out / name).stat().st_size for name in RANK_FILES]
    assert planned["rank_bytes"] == sizes
    assert [(rank["file"], rank["size"]) for rank in inspected["ranks"]] == list(zip(RANK_FILES, sizes))
    assert converted.pop("seconds") > 0
    assert converted == {"out": str(out), **inspected, "left_behind": []}
    # A manifest does not tell which parameters hold heads.
    assert inspected["parameters"] == [{k: row[k] for k in row if k != "heads"} for row in planned["parameters"]]
    assert inspected["extras"] == ["config.json", "generation_config.json"]
    whole = sum(p.stat().st_size for p in out.iterdir() if p.name != "reshard.json")
    assert verified == {"out": str(out), "files": 4, "tensors": 42, "size": whole, "elements": None}
    assert sorted(p.name for p in out.iterdir()) == sorted([*RANK_FILES, *inspected["extras"], "reshard.json"])
    assert tree(source) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_text_output(source: Path, out: Path, cli: Cli) -> None:
    assert cli(*convert(source, out)).out.startswith(f"{out}: 2 rank files, ")
    inspected = cli("inspect", out)
    assert all(word in inspected.out for word in ("LlamaForCausalLM", "Shard(0)", *RANK_FILES))
    assert cli("verify", out).out.startswith(f"{out}: ok, 4 files, 42 tensors, ")
    assert "elements equal to the source" in cli("verify", out, "--against", source).out


def test_output_bytes_depend_on_nothing_else(source: Path, tmp_path: Path, cli: Cli) -> None:
    outs = []
    for turn, workers in enumerate((1, 4, 4, 4, 4, 4)):
        outs.append(tmp_path / f"out-{turn}")
        assert cli(*convert(source, outs[-1], "--workers", workers)).code == 0
    trees = [tree(out) for out in outs]
    assert len(trees[0]) == 5
    assert all(found == trees[0] for found in trees)


def test_many_workers(source: Path, out: Path, cli: Cli, resharded: Path) -> None:
    assert cli(*convert(source, out, "--workers", 1000)).code == 0
    assert [(out / name).read_bytes() for name in RANK_FILES] == [(resharded / n).read_bytes() for n in RANK_FILES]


def test_one_rank_holds_the_whole(source: Path, out: Path, cli: Cli) -> None:
    assert cli("convert", source, out, "-tp", 1).code == 0
    expected: dict[str, torch.Tensor] = {}
    for path in source.glob("*.safetensors"):
        expected.update(load_file(path))
    found = load_file(out / RANK_FILES[0])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_dtype(source: Path, out: Path, cli: Cli) -> None:
    assert cli(*convert(source, out, "--dtype", "bfloat16")).code == 0
    assert {t.dtype for name in RANK_FILES for t in load_file(out / name).values()} == {torch.bfloat16}
    assert cli("verify", out, "--against", source).code == 0


@pytest.fixture
def evil(source: Path) -> Path:
    """A checkpoint with an unused tensor whose name would paint the terminal."""
    return single_file(source, lambda tensors: tensors.update({EVIL: torch.arange(6.0)}))


@pytest.mark.parametrize("style", ["text", "json"])
def test_control_characters_in_a_tensor_name(style: str, evil: Path, out: Path, cli: Cli) -> None:
    results = [
        cli("plan", evil, "--tp-size", 2, "--format", style),
        cli(*convert(evil, out, "--format", style)),
        cli("inspect", out, "--format", style),
        cli("verify", out, "--format", style),
    ]
    for result in results:
        assert (result.code, result.err) == (0, "")
        assert_no_controls(result)
    for result in (results[0], results[2]):
        assert ESCAPED in result.out or json.loads(result.out)["unused"] == [EVIL]


def test_damage_to_a_tensor_with_control_characters_in_its_name(evil: Path, out: Path, cli: Cli) -> None:
    assert cli(*convert(evil, out)).code == 0
    flip(out / "unused.safetensors", -1)
    assert_one_error(cli("verify", out), 4, "unused.safetensors", ESCAPED)


def test_unused_tensors_are_kept_or_dropped(evil: Path, tmp_path: Path, cli: Cli) -> None:
    kept, dropped = tmp_path / "kept", tmp_path / "dropped"
    assert cli(*convert(evil, kept)).code == 0
    assert cli(*convert(evil, dropped, "--drop-unused")).code == 0
    assert torch.equal(load_file(kept / "unused.safetensors")[EVIL], torch.arange(6.0))
    assert tree(dropped).keys() == tree(kept).keys() - {"unused.safetensors"}
    for folder, found in ((kept, ([EVIL], [])), (dropped, ([], [EVIL]))):
        report = json.loads(cli("inspect", folder, "--format", "json").out)
        assert (report["unused"], report["dropped"]) == found
        assert cli("verify", folder, "--against", evil).code == 0

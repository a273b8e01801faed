"""The command line from outside: exit codes, the one line of an error, and what is left on the disk afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard.cli
import reshard.conversion
import reshard.executor
from reshard.manifest import sealed_text

INDEX = "model.safetensors.index.json"
RANK_FILES = [f"shard-{rank:05d}-model-00001-of-00001.safetensors" for rank in (1, 2)]
EVIL = "evil\x1b[31m\n\x07"  # click takes the colour away where there is no terminal, but not the bell
COMMANDS = ["convert", "plan", "inspect", "verify", "run"]

Checkpoint = Callable[..., Path]


@dataclass(frozen=True)
class Result:
    code: Any
    out: str
    err: str

    @property
    def error(self) -> str:
        return next(line for line in self.err.splitlines() if line.startswith("Error: "))

    @property
    def hint(self) -> str:
        return next((line for line in self.err.splitlines() if line.startswith("Hint: ")), "")


Cli = Callable[..., Result]


class TooSlow(BaseException):
    """Not an Exception, so that the code under test cannot take it for a failure of its own."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process, for 20 seconds at most."""

    def run(*arguments: object, seconds: float = 20) -> Result:
        capfd.readouterr()
        before = signal.getsignal(signal.SIGTERM)
        code: Any = 0
        try:
            with time_limit(seconds):
                reshard.cli.main([str(argument) for argument in arguments])
        except SystemExit as finished:
            code = finished.code
        finally:
            signal.signal(signal.SIGTERM, before)
        return Result(code, *capfd.readouterr())

    return run


def tree(root: Path) -> dict[str, Any]:
    """Everything under `root`: content of files, target of links, type of what else there is."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            content: Any = os.readlink(path)
        elif stat.S_ISREG(mode):
            content = path.read_bytes()
        else:
            content = stat.S_IFMT(mode)
        found[str(path.relative_to(root))] = content
    return found


def assert_one_error(result: Result, code: int, *mentions: str, hint: str = "") -> None:
    assert result.code == code, result
    lines = result.err.splitlines()
    assert lines, result
    assert lines[0].startswith("Error: "), result
    assert all(line.startswith("Hint: ") for line in lines[1:]), result
    assert len(lines) <= 2, result
    assert "Traceback" not in result.err
    assert "unexpected" not in lines[0]
    assert result.out == ""
    assert_no_controls(result)
    for mention in mentions:
        assert mention in lines[0], (mention, result)
    assert hint in result.hint, result


def assert_no_controls(result: Result) -> None:
    assert all(c == "\n" or c.isprintable() for c in result.out + result.err), result


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Callable[..., Result]:
    """Run a command that must fail in one line, and leave everything under `tmp_path` as it was."""

    def run(code: int, arguments: list[object], *mentions: str, hint: str = "") -> Result:
        before = tree(tmp_path)
        result = cli(*arguments)
        assert_one_error(result, code, *mentions, hint=hint)
        assert tree(tmp_path) == before
        return result

    return run


Refused = Callable[..., Result]


@pytest.fixture
def source(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A copy of a llama checkpoint in three files, to be spoilt."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "source"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="session")
def resharded(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama checkpoint on two ranks. Read only."""
    folder = tmp_path_factory.mktemp("resharded") / "llama-tp2"
    reshard.convert(checkpoint("llama"), folder, tp_size=2)
    return folder


@pytest.fixture
def folder(resharded: Path, out: Path) -> Path:
    """A copy of the resharded folder, at `out`, to be spoilt."""
    return Path(shutil.copytree(resharded, out))


def convert(source: object, out: object, *options: object) -> list[object]:
    return ["convert", source, out, "--tp-size", 2, *options]


def first_file(source: Path) -> Path:
    return source / "model-00001-of-00003.safetensors"


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def configure(source: Path, **fields: Any) -> None:
    edit_json(source / "config.json", lambda config: config.update(fields))


def weight_map(source: Path, change: Callable[[dict[str, str]], object]) -> None:
    edit_json(source / INDEX, lambda index: change(index["weight_map"]))


def single_file(source: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda _: None) -> Path:
    """Put a checkpoint's tensors into one `model.safetensors`, without an index."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors.update(load_file(path))
        path.unlink()
    (source / INDEX).unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as somebody would who knows how to seal it."""
    content = json.loads((folder / "reshard.json").read_text())
    content.pop("seal")
    change(content)
    (folder / "reshard.json").write_bytes(sealed_text(content))


# --- sources that cannot be used ---


@pytest.mark.parametrize("length", [0, 4, 8, 9, 1000, 20_000, -1])
def test_truncated_source_file(length: int, source: Path, out: Path, refused: Refused) -> None:
    path = first_file(source)
    os.truncate(path, length if length >= 0 else path.stat().st_size + length)
    refused(3, convert(source, out), path.name)


def test_source_file_with_bytes_after_its_end(source: Path, out: Path, refused: Refused) -> None:
    path = first_file(source)
    path.write_bytes(path.read_bytes() + b"\0")
    refused(3, convert(source, out), path.name)


def _add_to_index(source: Path) -> None:
    weight_map(source, lambda found: found.update({"model.ghost.weight": first_file(source).name}))


def _drop_from_index(source: Path) -> None:
    weight_map(source, lambda found: found.pop("model.embed_tokens.weight"))


def _tensor_in_two_files(source: Path) -> None:
    extra = {name: torch.zeros(2) for name in load_file(first_file(source))}
    rewrite(source / "model-00002-of-00003.safetensors", lambda tensors: tensors.update(extra))


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(path: Path, target: Path) -> None:
    """Move a file to `target`, and leave a link in its place."""
    path.rename(target)
    path.symlink_to(target)


def _pickled(source: Path) -> None:
    for path in [*source.glob("*.safetensors"), source / INDEX]:
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _reshape(source: Path) -> None:
    single_file(source, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(130, 16)}))


def _index_to(source: Path, file: str) -> None:
    weight_map(source, lambda found: found.update({"lm_head.weight": file}))


def _both_kinds(source: Path) -> None:
    shutil.copy(first_file(source), source / "model.safetensors")


# What is done to the source, the exit code, and what the error must name.
SPOILT: dict[str, tuple[Callable[[Path], object], int, tuple[str, ...]]] = {
    "missing file": (lambda s: first_file(s).unlink(), 3, ("model-00001-of-00003.safetensors",)),
    "index names more": (_add_to_index, 3, ("model.ghost.weight", "model-00001-of-00003.safetensors")),
    "index names less": (_drop_from_index, 3, ("model.embed_tokens.weight", "model-00001-of-00003.safetensors")),
    "tensor in two files": (
        _tensor_in_two_files,
        3,
        ("model.embed_tokens.weight", "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"),
    ),
    "index leaves the folder": (lambda s: _index_to(s, "../x.safetensors"), 11, ("../x.safetensors",)),
    "index is absolute": (lambda s: _index_to(s, "/etc/x.safetensors"), 11, ("/etc/x.safetensors",)),
    "index names no string": (lambda s: weight_map(s, lambda f: f.update({"lm_head.weight": 5})), 3, ("lm_head",)),
    "index names a pickle": (lambda s: _index_to(s, "x.bin"), 3, ("x.bin",)),
    "link out": (
        lambda s: _link(first_file(s), s.parent / "elsewhere.safetensors"),
        11,
        ("model-00001-of-00003.safetensors",),
    ),
    "config links out": (lambda s: _link(s / "config.json", s.parent / "c.json"), 11, ("config.json",)),
    "extra links out": (lambda s: _link(s / "generation_config.json", s.parent / "g.json"), 11, ("generation_config",)),
    "fifo": (lambda s: _fifo(first_file(s)), 3, ("model-00001-of-00003.safetensors",)),
    "fifo as index": (lambda s: _fifo(s / INDEX), 3, (INDEX,)),
    "fifo as config": (lambda s: _fifo(s / "config.json"), 3, ("config.json",)),
    "folder as file": (lambda s: (first_file(s).unlink(), first_file(s).mkdir()), 3, ("model-00001-of-00003",)),
    "malformed index": (lambda s: (s / INDEX).write_text('{"weight_map": {'), 3, (INDEX, "JSON")),
    "index of nothing": (lambda s: (s / INDEX).write_text('{"weight_map": {}}'), 3, (INDEX,)),
    "index is a list": (lambda s: (s / INDEX).write_text("[]"), 3, (INDEX,)),
    "index nested deeply": (lambda s: (s / INDEX).write_text("[" * 200_000), 3, (INDEX,)),
    "duplicate keys in index": (
        lambda s: (s / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
        3,
        (INDEX, "twice"),
    ),
    "two kinds of weights": (_both_kinds, 3, ("model.safetensors",)),
    "no weights": (lambda s: [p.unlink() for p in (*s.glob("*.safetensors"), s / INDEX)], 3, ("source", INDEX)),
    "no config": (lambda s: (s / "config.json").unlink(), 3, ("config.json",)),
    "config is a list": (lambda s: (s / "config.json").write_text("[1]"), 3, ("config.json",)),
    "config is garbage": (lambda s: (s / "config.json").write_bytes(b"\xff\x00{"), 3, ("config.json",)),
    "config is empty": (lambda s: (s / "config.json").write_bytes(b""), 3, ("config.json",)),
    "unknown model type": (lambda s: configure(s, model_type="nope"), 8, ("nope", "transformers")),
    "unknown architecture": (lambda s: configure(s, architectures=["NopeForCausalLM"]), 8, ("NopeForCausalLM",)),
    "absurd layers": (lambda s: configure(s, num_hidden_layers=10**12), 3, ("config.json", "num_hidden_layers")),
    "absurd vocabulary": (lambda s: configure(s, vocab_size=10**18), 3, ("config.json",)),
    "wrong type in config": (lambda s: configure(s, hidden_size="big"), 3, ("config.json", "hidden_size")),
    "heads of nothing": (lambda s: configure(s, num_attention_heads=0), 3, ("config.json",)),
    "control characters in config": (lambda s: configure(s, hidden_act=EVIL), 3, ("config.json", "evil\\x1b")),
    "quantized": (lambda s: configure(s, quantization_config={"quant_method": "gptq"}), 3, ("quantized", "gptq")),
    "missing parameter": (
        lambda s: single_file(s, lambda tensors: tensors.pop("model.norm.weight")),
        3,
        ("lacks 1 ", "model.norm.weight"),
    ),
    "more layers than tensors for": (lambda s: configure(s, num_hidden_layers=3), 3, ("model.layers.2.",)),
    "wrong shape": (_reshape, 3, ("lm_head.weight", "[130, 32]", "[130, 16]")),
    "architecture is a number": (lambda s: configure(s, architectures=[5]), 3, ("config.json",)),
    "architecture is abstract": (lambda s: configure(s, architectures=["PreTrainedModel"]), 8, ("PreTrainedModel",)),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_source(case: str, source: Path, out: Path, refused: Refused) -> None:
    spoil, code, mentions = SPOILT[case]
    spoil(source)
    started = time.monotonic()
    refused(code, convert(source, out), *mentions)
    assert time.monotonic() - started < 5


def test_pickled_weights_have_a_way_out(source: Path, out: Path, refused: Refused) -> None:
    _pickled(source)
    refused(3, convert(source, out), "pytorch_model.bin", hint="transformers")


def test_absurd_layers_under_another_name(source: Path, out: Path, cli: Cli) -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 10**6}
    (source / "config.json").write_text(json.dumps(config))
    assert_one_error(cli(*convert(source, out), seconds=3), 3, "config.json")
    assert os.listdir(out.parent) == ["source"]


def test_folder_named_like_a_license_is_no_obstacle(source: Path, out: Path, cli: Cli) -> None:
    (source / "LICENSES").mkdir()
    assert cli(*convert(source, out)).code == 0


def test_link_inside_the_folder_is_followed(source: Path, out: Path, cli: Cli, resharded: Path) -> None:
    _link(first_file(source), source / "blob")
    assert cli(*convert(source, out)).code == 0
    for name in RANK_FILES:
        assert (out / name).read_bytes() == (resharded / name).read_bytes()


def test_control_characters_in_names_of_files_are_escaped(source: Path, out: Path, refused: Refused) -> None:
    _index_to(source, f"{EVIL}.safetensors")
    refused(3, convert(source, out), "evil\\x1b[31m\\n\\x07")


def test_unknown_style(source: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig

    monkeypatch.setitem(LlamaConfig.base_model_tp_plan, "layers.*.mlp.gate_proj", "made_up")
    refused(3, convert(source, out), "made_up", hint="known styles: ")
    assert "colwise" in refused(3, convert(source, out)).hint


def test_unknown_style_of_a_module_without_parameters(
    source: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig

    monkeypatch.setitem(LlamaConfig.base_model_tp_plan, "layers.*.mlp", "made_up")
    refused(3, convert(source, out), "made_up", hint="known styles: ")


@pytest.mark.parametrize("size", [3, 8, 64, 10**9])
def test_ranks_that_do_not_fit(size: int, source: Path, out: Path, refused: Refused) -> None:
    refused(9, ["convert", source, out, "--tp-size", size], f"{size} ranks", hint="legal sizes: 1, 2, 4")


# --- places ---


def test_no_such_source(out: Path, tmp_path: Path, refused: Refused) -> None:
    refused(3, convert(tmp_path / "not" / "there", out), "not/there: no such folder")
    refused(3, convert("./not-there", out), "./not-there: no such folder")


def test_source_is_a_file(source: Path, out: Path, refused: Refused) -> None:
    refused(3, convert(first_file(source), out), first_file(source).name)


def test_source_is_resharded_already(folder: Path, tmp_path: Path, refused: Refused) -> None:
    refused(3, convert(folder, tmp_path / "again"), "already resharded")
    refused(3, convert(folder, folder, "--overwrite"), "already resharded")


@pytest.mark.parametrize("kind", ["resharded", "folder", "file", "dangling link"])
def test_out_exists(kind: str, source: Path, out: Path, resharded: Path, refused: Refused) -> None:
    if kind == "resharded":
        shutil.copytree(resharded, out)
    elif kind == "folder":
        out.mkdir()
        (out / "precious.txt").write_text("mine")
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to("nowhere")
    refused(7, convert(source, out), "out: already exists", hint="--overwrite")
    if kind != "resharded":
        refused(7, convert(source, out, "--overwrite"), "not a resharded folder")


def test_link_to_a_resharded_folder_is_not_overwritten(
    source: Path, out: Path, tmp_path: Path, resharded: Path, refused: Refused
) -> None:
    out.symlink_to(shutil.copytree(resharded, tmp_path / "kept"))
    refused(7, convert(source, out, "--overwrite"), "out")


def test_overwrite(source: Path, folder: Path, tmp_path: Path, cli: Cli, resharded: Path) -> None:
    (folder / "stale.txt").write_text("old")
    result = cli("convert", source, folder, "--tp-size", 4, "--overwrite")
    assert (result.code, result.err) == (0, "")
    assert len(list(folder.glob("shard-*"))) == 4
    assert not (folder / "stale.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    assert cli("verify", folder).code == 0


def test_failed_overwrite_keeps_the_earlier_folder(source: Path, folder: Path, refused: Refused) -> None:
    os.truncate(first_file(source), 5000)
    refused(3, convert(source, folder, "--overwrite"), first_file(source).name)


def test_parent_is_missing(source: Path, tmp_path: Path, refused: Refused) -> None:
    refused(5, convert(source, tmp_path / "no" / "out"), "/no: no such folder")


def test_lock_is_busy(source: Path, out: Path, refused: Refused) -> None:
    with open(f"{out}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(6, convert(source, out), "out.lock")


def test_leftovers_of_a_killed_run_are_cleared(source: Path, out: Path, tmp_path: Path, cli: Cli) -> None:
    Path(f"{out}.lock").touch()
    Path(f"{out}.part").mkdir()
    (Path(f"{out}.part") / RANK_FILES[0]).write_bytes(b"half")
    assert cli(*convert(source, out)).code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    assert cli("verify", out).code == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB: the first rank file fits, the second does not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk takes root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "reshard-test", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mount: {mounted.stderr.decode().strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_disk_too_small_is_said_before_writing(
    source: Path, small_disk: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reshard.conversion, "write_files", None)  # would fail otherwise
    result = refused(5, convert(source, small_disk / "out"), "needs 1,1", "only 65,536 are free")
    assert "out" in result.error


def test_disk_full_while_writing(
    source: Path, small_disk: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reshard.conversion, "check_free_space", lambda *_: None)
    refused(5, convert(source, small_disk / "out"), RANK_FILES[1], "No space left")


def test_disk_full_leaves_no_file_open(
    source: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reshard.executor.os, "posix_fallocate", fail)
    before = os.listdir("/proc/self/fd")
    refused(5, convert(source, out), RANK_FILES[0], "No space left")
    assert os.listdir("/proc/self/fd") == before


def test_write_error(source: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(reshard.executor.os, "pwrite", fail)
    refused(5, convert(source, out), "Input/output error")


# --- the Hub ---


def test_hub_is_offline(out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(10, convert("reshard-tests/nothing", out), "reshard-tests/nothing", hint="local folder")
    refused(10, ["inspect", "reshard-tests/nothing"], "reshard-tests/nothing")


def test_hub_cannot_be_reached(out: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "reshard", *map(str, convert("reshard-tests/nothing", out))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert_one_error(Result(done.returncode, done.stdout, done.stderr), 10, "reshard-tests/nothing", hint="connection")
    assert list(tmp_path.iterdir()) == []


# --- usage ---


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
        (["plan", "source"], "--tp-size"),
        (["verify"], "OUT"),
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

    monkeypatch.setattr(reshard.conversion, "plan_layouts", fail)
    result = cli(*convert(source, out))
    assert result.code == 1
    assert "Traceback" not in result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    assert_no_controls(result)
    assert [line.partition(" ")[0] for line in result.err.splitlines()] == ["Error:", "Hint:"]


# --- interruptions ---


def on_progress(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Call `action` once, from the thread that has just written the first block."""
    left = [action]

    def update(_: int) -> None:
        if left:
            left.pop()()

    @contextlib.contextmanager
    def progress(*_: object) -> Iterator[Callable[[int], object]]:
        yield update

    monkeypatch.setattr(reshard.cli, "_progress", progress)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_leaves_nothing(
    number: int,
    code: int,
    overwrite: bool,
    source: Path,
    out: Path,
    tmp_path: Path,
    resharded: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []

    def interrupt() -> None:
        seen.append(Path(f"{out}.part").is_dir())
        os.kill(os.getpid(), number)
        time.sleep(0.3)  # the main thread takes the signal meanwhile

    if overwrite:
        shutil.copytree(resharded, out)
    on_progress(monkeypatch, interrupt)
    before = tree(tmp_path)
    result = cli(*convert(source, out, "--workers", 2, *(["--overwrite"] if overwrite else [])))
    assert seen == [True]
    assert result.code == code
    assert "Traceback" not in result.err
    assert result.out == ""
    assert result.err.strip() in ("", "Error: interrupted")
    assert tree(tmp_path) == before


def test_source_changes_meanwhile(source: Path, out: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    on_progress(monkeypatch, lambda: os.utime(first_file(source), ns=(1, 1)))
    result = cli(*convert(source, out))
    assert_one_error(result, 4, first_file(source).name, "changed")
    assert os.listdir(out.parent) == ["source"]


def test_source_vanishes_meanwhile(source: Path, out: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    last = source / "model-00003-of-00003.safetensors"
    on_progress(monkeypatch, last.unlink)
    result = cli(*convert(source, out, "--workers", 1))
    assert result.code in (3, 4)
    assert_one_error(result, result.code, last.name)
    assert os.listdir(out.parent) == ["source"]


def test_out_appears_meanwhile(source: Path, out: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    on_progress(monkeypatch, out.mkdir)
    assert_one_error(cli(*convert(source, out)), 7, "out")
    assert sorted(os.listdir(out.parent)) == ["out", "source"]
    assert os.listdir(out) == []


# --- verify ---


def _in_header(folder: Path) -> None:
    flip(folder / RANK_FILES[1], 60)


def _in_padding(folder: Path) -> None:
    path = folder / RANK_FILES[1]
    length = int.from_bytes(path.read_bytes()[:8], "little")
    flip(path, 8 + length - 1)


def _swap(folder: Path) -> None:
    one, other = (folder / name for name in RANK_FILES)
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)


def _truncate(path: Path, less: int = 1) -> None:
    os.truncate(path, path.stat().st_size - less)


DAMAGED: dict[str, tuple[Callable[[Path], object], int, tuple[str, ...]]] = {
    # Data starts with the first parameter, and ends with the last.
    "first tensor": (lambda f: flip(f / RANK_FILES[0], 4096), 4, (RANK_FILES[0], "model.embed_tokens.weight")),
    "last tensor": (lambda f: flip(f / RANK_FILES[1], -1), 4, (RANK_FILES[1], "lm_head.weight")),
    "header": (_in_header, 4, (RANK_FILES[1],)),
    "header length": (lambda f: flip(f / RANK_FILES[0], 1), 4, (RANK_FILES[0],)),
    "header padding": (_in_padding, 4, (RANK_FILES[1],)),
    "manifest": (lambda f: flip(f / "reshard.json", -200), 4, ("reshard.json",)),
    "manifest cut short": (lambda f: _truncate(f / "reshard.json", 9), 4, ("reshard.json",)),
    "manifest not text": (lambda f: (f / "reshard.json").write_bytes(b"\xff\xfe{"), 4, ("reshard.json",)),
    "copied file": (lambda f: flip(f / "config.json", 20), 4, ("config.json",)),
    "copied file longer": (lambda f: (f / "config.json").write_text("{}"), 4, ("config.json",)),
    "missing rank file": (lambda f: (f / RANK_FILES[1]).unlink(), 4, (RANK_FILES[1], "missing")),
    "missing copied file": (lambda f: (f / "config.json").unlink(), 4, ("config.json", "missing")),
    "short rank file": (lambda f: _truncate(f / RANK_FILES[0]), 4, (RANK_FILES[0],)),
    "extra file": (lambda f: (f / "more.safetensors").write_bytes(b""), 4, ("more.safetensors",)),
    "extra text": (lambda f: (f / "notes.txt").write_text(""), 4, ("notes.txt",)),
    "swapped rank files": (_swap, 4, (RANK_FILES[0],)),
    "rank file is a link out": (lambda f: _link(f / RANK_FILES[0], f.parent / "x"), 11, (RANK_FILES[0],)),
    "rank file is a fifo": (lambda f: _fifo(f / RANK_FILES[0]), 3, (RANK_FILES[0],)),
    "newer format": (lambda f: reseal(f, lambda c: c.update(format_version="2.0")), 8, ("reshard.json", "2.0")),
    "newer format, unsealed": (
        lambda f: edit_json(f / "reshard.json", lambda c: c.update(format_version="2.0")),
        8,
        ("reshard.json", "2.0"),
    ),
    "another format": (lambda f: reseal(f, lambda c: c.update(format="other")), 4, ("reshard.json",)),
    "no manifest": (lambda f: (f / "reshard.json").unlink(), 3, ("reshard.json",)),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_verify_names_the_damage(case: str, folder: Path, refused: Refused) -> None:
    damage, code, mentions = DAMAGED[case]
    damage(folder)
    refused(code, ["verify", folder], *mentions)


def test_newer_minor_format_is_read(folder: Path, cli: Cli) -> None:
    reseal(folder, lambda content: content.update(format_version="1.7", added_later=True))
    assert cli("verify", folder).code == 0


def test_path_in_the_manifest_does_not_leave_the_folder(folder: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copy(folder / RANK_FILES[0], tmp_path / "x.safetensors")
    reseal(folder, lambda content: content["ranks"][0].update(file="../x.safetensors"))
    result = refused(4, ["verify", folder], "x.safetensors")
    assert result.code in (4, 11)


WEIRD: list[Any] = [None, 0, -1, 10**30, "x", [], {}, [None], {"a": None}, True]
PARTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "top": lambda content: content,
    "model": lambda content: content["model"],
    "mesh": lambda content: content["mesh"],
    "source": lambda content: content["source"],
    "parameter": lambda content: content["parameters"][0],
    "rank": lambda content: content["ranks"][0],
    "extra": lambda content: content["extras"][0],
}


@pytest.mark.parametrize("part", PARTS)
def test_manifest_of_the_wrong_types(part: str, folder: Path, cli: Cli) -> None:
    """Whatever a sealed manifest says, `inspect` and `verify` have a word for it."""
    pick, path = PARTS[part], folder / "reshard.json"
    clean = path.read_bytes()
    unexpected = []
    for key in sorted(pick(json.loads(clean)).keys() - {"seal", "format", "format_version"}):
        for value in WEIRD:
            path.write_bytes(clean)
            reseal(folder, lambda content, key=key, value=value: pick(content).update({key: value}))
            codes = [cli(command, folder).code for command in ("inspect", "verify")]
            if not set(codes) <= {0, 3, 4, 8, 11}:
                unexpected.append((key, value, codes))
    assert unexpected == []


@pytest.mark.parametrize("shape", [[0], [-1], ["2"], [3], [10**30], [None]])
def test_manifest_with_an_impossible_number_of_ranks(shape: list[Any], folder: Path, refused: Refused) -> None:
    reseal(folder, lambda content: content["mesh"].update(shape=shape))
    refused(4, ["inspect", folder], "reshard.json")


def test_control_characters_in_a_manifest_are_escaped(folder: Path, cli: Cli) -> None:
    def change(content: dict[str, Any]) -> None:
        content["tool"] = {EVIL: EVIL}
        content["model"] = dict.fromkeys(content["model"], EVIL)
        content["source"].update(repo_id=EVIL, commit=EVIL)
        content["parameters"][0].update(style=EVIL, reason=EVIL, name=EVIL)
        content["tied"] = {EVIL: EVIL}
        content["dropped"] = content["runtime_only"] = [EVIL]
        content["ranks"][0]["digest"] = EVIL
        content["ranks"][0]["file"] = EVIL

    reseal(folder, change)
    for arguments in (["inspect", folder], ["inspect", folder, "--format", "json"], ["verify", folder]):
        assert_no_controls(cli(*arguments))


def test_against_the_source(resharded: Path, source: Path, cli: Cli) -> None:
    result = cli("verify", resharded, "--against", source, "--format", "json")
    assert (result.code, result.err) == (0, "")
    stored = sum(tensor.numel() for name in RANK_FILES for tensor in load_file(resharded / name).values())
    assert json.loads(result.out)["elements"] == stored


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_against_a_source_with_one_altered_element(name: str, resharded: Path, source: Path, refused: Refused) -> None:
    path = source / json.loads((source / INDEX).read_text())["weight_map"][name]
    rewrite(path, lambda tensors: tensors[name].view(-1)[-1:].add_(1))
    refused(4, ["verify", resharded, "--against", source], name, "differs")


def test_against_another_model(resharded: Path, checkpoint: Checkpoint, refused: Refused) -> None:
    refused(3, ["verify", resharded, "--against", checkpoint("gpt_neox")], "not the source")


@pytest.mark.parametrize(
    "options", [{"hidden_size": 16}, {"vocab_size": 65}, {"vocab_size": 260}, {"dtype": torch.bfloat16}], ids=str
)
def test_against_another_size_of_the_model(
    options: dict[str, Any], resharded: Path, checkpoint: Checkpoint, cli: Cli
) -> None:
    result = cli("verify", resharded, "--against", checkpoint("llama", **options))
    assert result.code in (3, 4)
    assert_one_error(result, result.code, "weight")


def _halve_last(source: Path, name: str) -> None:
    """Put a tensor into a file of its own, less the second half of its last dim."""
    path = source / json.loads((source / INDEX).read_text())["weight_map"][name]
    tensor = load_file(path)[name]
    rewrite(path, lambda tensors: tensors.pop(name))
    save_file({name: tensor[..., : tensor.shape[-1] // 2].contiguous()}, source / "last.safetensors")
    weight_map(source, lambda found: found.update({name: "last.safetensors"}))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.down_proj.weight"])
def test_against_a_source_that_holds_less(name: str, resharded: Path, source: Path, cli: Cli) -> None:
    _halve_last(source, name)
    result = cli("verify", resharded, "--against", source)
    assert result.code in (3, 4)
    assert_one_error(result, result.code, name)


def test_against_no_such_source(resharded: Path, tmp_path: Path, refused: Refused) -> None:
    refused(3, ["verify", resharded, "--against", tmp_path / "gone"], "gone")


# --- inspect, run ---


@pytest.mark.parametrize("command", ["inspect", "verify", "run"])
def test_not_a_resharded_folder(command: str, source: Path, tmp_path: Path, refused: Refused) -> None:
    refused(3, [command, source], "not a resharded folder", hint="reshard convert")
    refused(3, [command, tmp_path / "not" / "there"], "no such folder")


# --- what works ---


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
    assert [size for size, why in report["tp_sizes"].items() if why is None] == ["1", "2", "4"]
    assert report["unused"] == report["dropped"] == report["runtime_only"] == []
    text = cli("plan", source, "--tp-size", 2)
    assert (text.code, text.err) == (0, "")
    assert "legal tp sizes: 1, 2, 4\n" in text.out
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
    assert converted == {"out": str(out), **inspected}
    assert inspected["parameters"] == planned["parameters"]
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
    """A checkpoint with a tensor that the model does not use, and whose name would paint the terminal."""
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
        assert "evil\\x1b[31m\\n\\x07" in result.out or json.loads(result.out)["unused"] == [EVIL]


def test_damage_to_a_tensor_with_control_characters_in_its_name(evil: Path, out: Path, cli: Cli) -> None:
    assert cli(*convert(evil, out)).code == 0
    flip(out / "unused.safetensors", -1)
    assert_one_error(cli("verify", out), 4, "unused.safetensors", "evil\\x1b[31m\\n\\x07")


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

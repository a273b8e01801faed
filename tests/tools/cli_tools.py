"""Helpers of the tests of the command line; the fixtures are in conftest.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from reshard.resharded.manifest import sealed_text

INDEX = "model.safetensors.index.json"
RANK_FILES = [f"shard-{rank:05d}-model-00001-of-00001.safetensors" for rank in (1, 2)]
FIRST = "model-00001-of-00003.safetensors"
EVIL = "evil\x1b[31m\n\x07"  # without a terminal, click removes the colour, but not the bell
ESCAPED = "evil\\x1b[31m\\n\\x07"
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
Refused = Callable[..., Result]


class TooSlow(BaseException):
    """The time limit has passed. Not an Exception, so that the code under test cannot catch it as its own failure."""


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


def tree(root: Path) -> dict[str, Any]:
    """Return everything under `root`: the content of a file, the target of a link, the type of anything else."""
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
    # Lines that a subprocess prints before it fails.
    lines = [line for line in result.err.splitlines() if not line.startswith("planning ")]
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


def convert(source: object, out: object, *options: object) -> list[object]:
    return ["convert", source, out, "--tp-size", 2, *options]


def first_file(source: Path) -> Path:
    return source / FIRST


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


def file_of(source: Path, name: str) -> Path:
    """Return the source file that holds a tensor."""
    return source / json.loads((source / INDEX).read_text())["weight_map"][name]


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
    """Change a manifest, and seal it again."""
    content = json.loads((folder / "reshard.json").read_text())
    content.pop("seal")
    change(content)
    (folder / "reshard.json").write_bytes(sealed_text(content))


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path, target: Path) -> None:
    """Move a file to `target`, and leave a link in its place."""
    path.rename(target)
    path.symlink_to(target)

"""Untrusted names and strings never reach a terminal raw, neither in messages nor in JSON."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import (
    FIRST,
    INDEX,
    RANK_FILES,
    Cli,
    Result,
    assert_no_controls,
    configure,
    convert,
    first_file,
    flip,
    reseal,
    rewrite,
    weight_map,
)

# Colours, a bell, new lines of any kind, DEL and C1, reordering characters, and invisible ones.
HOSTILE = "evil\x1b[31m\n\r\x07\x7f\x85\x9b\u2028\u202e\u2066\u200b\ufeff\U000e0041"
SHOWN = "evil\\x1b[31m\\n\\r\\x07\\x7f\\x85\\x9b\\u2028\\u202e\\u2066\\u200b\\ufeff\\U000e0041"


def clean(result: Result) -> Result:
    assert_no_controls(result)
    assert "unexpected" not in result.err, result
    return result


def add_unused(source: Path, name: str) -> None:
    rewrite(first_file(source), lambda tensors: tensors.update({name: torch.zeros(3)}))
    weight_map(source, lambda found: found.update({name: FIRST}))


@pytest.fixture
def hostile(source: Path) -> Path:
    """A sound checkpoint; a file, an unused tensor and a small file have the name HOSTILE."""
    add_unused(source, HOSTILE)
    name = f"{HOSTILE}.safetensors"
    first_file(source).rename(source / name)
    weight_map(source, lambda found: found.update({tensor: name for tensor in found if found[tensor] == FIRST}))
    (source / f"{HOSTILE}.txt").write_text(HOSTILE)
    configure(source, _name_or_path=HOSTILE, transformers_version=HOSTILE, more={HOSTILE: HOSTILE})
    return source


@pytest.mark.fault(28)
def test_every_command(hostile: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / HOSTILE
    commands: list[list[object]] = [
        ["plan", hostile, "--tp-size", 2],
        convert(hostile, out, "--dry-run"),
        convert(hostile, out),
        convert(hostile, out, "--overwrite"),
        convert(hostile, tmp_path / "dropped", "--drop-unused"),
        ["inspect", out],
        ["verify", out],
        ["verify", out, "--against", hostile],
        ["merge", out, tmp_path / f"{HOSTILE} again"],
    ]
    for command in commands:
        result = clean(cli(*command))
        assert (result.code, result.err) == (0, ""), result
        shutil.rmtree(tmp_path / f"{HOSTILE} again", ignore_errors=True)
        if command[1] == hostile and command[0] == "convert" and command[-1] != "--dry-run":
            shutil.rmtree(command[2])  # type: ignore[arg-type]
        again = clean(cli(*command, "--format", "json"))
        assert (again.code, again.err) == (0, ""), again
        assert isinstance(json.loads(again.out), dict)
    assert SHOWN in cli("plan", hostile, "--tp-size", 2).out
    assert json.loads(cli("inspect", out, "--format", "json").out)["unused"] == [HOSTILE]


def _cut(source: Path) -> None:
    os.truncate(source / f"{HOSTILE}.safetensors", 1000)


def _twice(source: Path) -> None:
    rewrite(source / "model-00002-of-00003.safetensors", lambda tensors: tensors.update({HOSTILE: torch.ones(3)}))


def _header(source: Path, name: str) -> None:
    """Write a file whose only tensor has this name and an unknown dtype."""
    path = source / f"{HOSTILE}.safetensors"
    raw = json.dumps({name: {"dtype": HOSTILE, "shape": [], "data_offsets": [0, 0]}}).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)


FAULTS: dict[str, Callable[[Path], object]] = {
    "file cut": _cut,
    "file gone": lambda s: (s / f"{HOSTILE}.safetensors").unlink(),
    "tensor twice": _twice,
    "dtype": lambda s: _header(s, HOSTILE),
    "half a character in a header": lambda s: _header(s, "\ud800"),
    "index to another name": lambda s: weight_map(s, lambda found: found.update({HOSTILE: HOSTILE})),
    "index to half a character": lambda s: weight_map(s, lambda found: found.update({HOSTILE: "\ud800.safetensors"})),
    "index to no name": lambda s: weight_map(s, lambda found: found.update({HOSTILE: [HOSTILE]})),
    "index is no JSON": lambda s: (s / INDEX).write_text('{"weight_map": {' + HOSTILE),
    "model type": lambda s: configure(s, model_type=HOSTILE),
    "model type of half a character": lambda s: configure(s, model_type="\ud800"),
    "architecture": lambda s: configure(s, model_type="vit", architectures=[HOSTILE]),
    "architecture of half a character": lambda s: configure(s, model_type="vit", architectures=["\ud800"]),
    "activation": lambda s: configure(s, hidden_act=HOSTILE),
    "size": lambda s: configure(s, hidden_size=HOSTILE),
    "rope": lambda s: configure(s, rope_scaling={"rope_type": HOSTILE, "factor": HOSTILE}),
    "quantization": lambda s: configure(s, quantization_config={"quant_method": HOSTILE}),
    "code": lambda s: configure(s, model_type=HOSTILE, auto_map={"AutoConfig": HOSTILE}),
    "other files": lambda s: configure(s, configuration_files=[HOSTILE]),
    "a second one for a parameter": lambda s: add_second(s),
}


def add_second(source: Path) -> None:
    """Add a tensor whose name transformers takes for a parameter's, in another shape."""
    name = f"{HOSTILE}.safetensors"
    rewrite(source / name, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(5)}))


@pytest.mark.fault(28)
@pytest.mark.parametrize("verbose", [[], ["-v"]], ids=["", "-v"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_error(fault: str, verbose: list[str], hostile: Path, out: Path, cli: Cli) -> None:
    FAULTS[fault](hostile)
    result = clean(cli(*verbose, *convert(hostile, out)))
    assert result.code in (3, 8, 11), result
    assert result.error
    if not verbose:
        assert len(result.err.splitlines()) <= 2, result


@pytest.mark.fault(28)
def test_what_is_told_of_a_class_and_of_a_prefix(hostile: Path, tmp_path: Path, cli: Cli) -> None:
    configure(hostile, architectures=[HOSTILE])
    for path in hostile.glob("*.safetensors"):
        rewrite(path, lambda tensors: [tensors.update({f"{HOSTILE}.{n}": tensors.pop(n)}) for n in list(tensors)])
    weight_map(hostile, lambda found: [found.update({f"{HOSTILE}.{n}": found.pop(n)}) for n in list(found)])
    for command in (["plan", hostile], ["convert", hostile, tmp_path / "out"]):
        result = clean(cli(*command, "--tp-size", 2, aloud=True))
        assert (result.code, (result.out + result.err).count(f"begin with {SHOWN}.")) == (0, 1), result
        assert f"names the architecture {SHOWN}" in result.out + result.err


def strings(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every string in a manifest, followed by whether the string is a key."""
    if isinstance(value, str):
        yield (*path, False)
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from strings(item, (*path, key))
        if isinstance(value, dict):
            yield (*path, key, True)


def put(content: Any, place: tuple[Any, ...], text: str) -> None:
    *path, last, is_key = place
    for key in path:
        content = content[key]
    if is_key:
        content[text] = content.pop(last)
    else:
        content[last] = text


@pytest.mark.fault(28)
def test_every_kind_of_string_in_a_manifest(folder: Path, source: Path, tmp_path: Path, cli: Cli) -> None:
    """Each string is changed alone and the manifest sealed again."""
    merged = tmp_path / "merged"
    original = (folder / "reshard.json").read_bytes()
    kinds = {
        tuple("*" if isinstance(key, int) or "." in key else key for key in place[:-1]) + place[-1:]: place
        for place in strings(json.loads(original))
        if place[0] not in ("format", "seal", "digest")
    }
    assert len(kinds) > 40
    codes = set()
    for place in kinds.values():
        for text in (HOSTILE, f"{HOSTILE}.safetensors", "\ud800"):
            (folder / "reshard.json").write_bytes(original)
            reseal(folder, lambda found, place=place, text=text: put(found, place, text))
            for command in (
                ["inspect", folder],
                ["inspect", folder, "--format", "json"],
                ["verify", folder, "--against", source],
                ["merge", folder, merged],
            ):
                codes.add(clean(cli(*command)).code)
            shutil.rmtree(merged, ignore_errors=True)
    assert codes <= {0, 3, 4, 8, 9, 11}


@pytest.mark.fault(28)
def test_files_of_a_folder(folder: Path, cli: Cli) -> None:
    (folder / HOSTILE).write_text("")
    assert SHOWN in clean(cli("verify", folder)).error
    (folder / HOSTILE).unlink()
    flip(folder / RANK_FILES[0], 5000)
    hidden = folder.rename(folder.with_name(HOSTILE))
    assert SHOWN in clean(cli("verify", hidden)).error
    assert SHOWN in clean(cli("-v", "verify", hidden)).error


@pytest.mark.fault(28)
@pytest.mark.parametrize("command", ["plan", "convert", "inspect", "verify", "merge", "run"])
def test_arguments(command: str, tmp_path: Path, cli: Cli) -> None:
    """Arguments may come from a list of models that somebody made."""
    more = {
        "plan": ["--tp-size", 2],
        "convert": [tmp_path / "o", "--tp-size", 2],
        "merge": [tmp_path / "o"],
        "run": ["--prompt", "x"],
    }
    for name in (HOSTILE, os.fsdecode(b"\xff"), f"org/{HOSTILE}"):
        result = clean(cli(command, name, *more.get(command, [])))
        assert result.code == 3, result
        clean(cli("plan", tmp_path, "--tp-size", 2, "--plan", name))
        clean(cli("plan", tmp_path, "--tp-size", name))
        clean(cli(name))

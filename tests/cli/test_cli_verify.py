"""`reshard verify` and `inspect` of damaged folders, of hostile manifests, and against sources that differ."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import (
    EVIL,
    RANK_FILES,
    Checkpoint,
    Cli,
    Refused,
    assert_no_controls,
    assert_one_error,
    edit_json,
    fifo,
    file_of,
    flip,
    link,
    reseal,
    rewrite,
    weight_map,
)
from safetensors.torch import load_file, save_file


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
    "header": (lambda f: flip(f / RANK_FILES[1], 60), 4, (RANK_FILES[1],)),
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
    "rank file is a link out": (lambda f: link(f / RANK_FILES[0], f.parent / "x"), 11, (RANK_FILES[0],)),
    "rank file is a fifo": (lambda f: fifo(f / RANK_FILES[0]), 3, (RANK_FILES[0],)),
    "newer format": (lambda f: reseal(f, lambda c: c.update(format_version="4.0")), 8, ("reshard.json", "4.0")),
    "newer format, unsealed": (
        lambda f: edit_json(f / "reshard.json", lambda c: c.update(format_version="4.0")),
        8,
        ("reshard.json", "3.0"),
    ),
    "another format": (lambda f: reseal(f, lambda c: c.update(format="other")), 4, ("reshard.json",)),
    "no manifest": (lambda f: (f / "reshard.json").unlink(), 3, ("reshard.json",)),
}


@pytest.mark.fault(19, 21)
@pytest.mark.parametrize("case", DAMAGED)
def test_verify_names_the_damage(case: str, folder: Path, refused: Refused) -> None:
    damage, code, mentions = DAMAGED[case]
    damage(folder)
    refused(code, ["verify", folder], *mentions)


@pytest.mark.parametrize("command", ["inspect", "verify", "run"])
def test_not_a_resharded_folder(command: str, source: Path, tmp_path: Path, refused: Refused) -> None:
    more = ["--prompt", "x"] if command == "run" else []
    refused(3, [command, source, *more], "not a resharded folder", hint="reshard convert")
    refused(3, [command, tmp_path / "not" / "there", *more], "no such folder")


# --- manifests ---


@pytest.mark.fault(23)
def test_newer_minor_format(folder: Path, cli: Cli, refused: Refused) -> None:
    reseal(folder, lambda content: content.update(format_version="2.7"))
    assert cli("verify", folder).code == 0
    reseal(folder, lambda content: content.update(added_later=True))
    refused(8, ["verify", folder], "format version 2.7 has added_later", hint="upgrade reshard")


@pytest.mark.fault(23)
def test_a_format_that_needs_what_is_not_known(folder: Path, cli: Cli, refused: Refused) -> None:
    reseal(folder, lambda content: content.update(format_version="3.0", requires=[], remark="harmless"))
    assert cli("verify", folder).code == 0
    reseal(folder, lambda content: content.update(requires=["twist"]))
    refused(8, ["verify", folder], "format version 3.0 needs twist", hint="upgrade reshard")


@pytest.mark.fault(12)
def test_path_in_the_manifest_does_not_leave_the_folder(folder: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copy(folder / RANK_FILES[0], tmp_path / "x.safetensors")
    reseal(folder, lambda content: content["ranks"][0].update(file="../x.safetensors"))
    refused(4, ["verify", folder], "x.safetensors")


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
    """`inspect` and `verify` explain every wrong value of a sealed manifest."""
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


@pytest.mark.parametrize("size", [0, -1, "2", 3, 10**30, None])
def test_manifest_with_an_impossible_number_of_ranks(size: Any, folder: Path, refused: Refused) -> None:
    reseal(folder, lambda content: content["mesh"].update(tp=size))
    refused(4, ["inspect", folder], "reshard.json")


@pytest.mark.fault(28)
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


# --- against the source ---


def test_against_the_source(resharded: Path, source: Path, cli: Cli) -> None:
    result = cli("verify", resharded, "--against", source, "--format", "json")
    assert (result.code, result.err) == (0, "")
    stored = sum(tensor.numel() for name in RANK_FILES for tensor in load_file(resharded / name).values())
    assert json.loads(result.out)["elements"] == stored


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_against_a_source_with_one_altered_element(name: str, resharded: Path, source: Path, refused: Refused) -> None:
    path = file_of(source, name)
    rewrite(path, lambda tensors: tensors[name].view(-1)[-1:].add_(1))
    refused(4, ["verify", resharded, "--against", source], name, "differs")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
def test_elements_that_are_nowhere(name: str, folder: Path, source: Path, refused: Refused) -> None:
    """The digests are right, but the manifest leaves out elements of the source."""

    def forget(content: dict[str, Any]) -> None:
        [parameter] = [p for p in content["parameters"] if p["name"] == name]
        [other] = [p for p in content["parameters"] if p["name"] != name and p["shape"] == parameter["shape"]][:1]
        parameter["from"] = other["from"]

    reseal(folder, forget)
    refused(4, ["verify", folder, "--against", source], name, "not every element of it is in the folder")


_EMBED_OUT = "embed_out.weight is F32 of shape [130, 32] here, and was absent there"


def test_against_another_model(resharded: Path, checkpoint: Checkpoint, refused: Refused) -> None:
    refused(3, ["verify", resharded, "--against", checkpoint("gpt_neox")], "is not what", _EMBED_OUT)


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
    """Move a tensor into a file of its own, without the second half of its last dim."""
    path = file_of(source, name)
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

"""Folders that no rank accepts: altered rank files, and another number of ranks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_tools import RANK_FILES, flip, reseal
from places import WORKERS
from torchrun_tools import on_ranks

WORKER = WORKERS / "refusals.py"
FIRST, SECOND = RANK_FILES
DATA_START = 4096


def zero(path: Path, begin: int, end: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[begin:end] = bytes(len(data[begin:end]))
    path.write_bytes(data)


def swap(folder: Path) -> None:
    (folder / FIRST).rename(folder / "aside")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "aside").rename(folder / SECOND)


def resize(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size + by)


DOWN = "model.layers.1.mlp.down_proj.weight"


def down_of(content: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest's entry of a parameter that is cut along dim 1."""
    return next(parameter for parameter in content["parameters"] if parameter["name"] == DOWN)


# The error on all ranks: its type, and words of its line.
DAMAGED: dict[str, tuple[Callable[[Path], object], str, tuple[str, ...]]] = {
    "a bit of the first tensor": (
        lambda f: flip(f / FIRST, DATA_START),
        "IntegrityError",
        ("rank 0: ", FIRST, "tensor model.embed_tokens.weight was altered"),
    ),
    "a bit of the last tensor": (
        lambda f: flip(f / SECOND, -1),
        "IntegrityError",
        ("rank 1: ", SECOND, "tensor lm_head.weight was altered"),
    ),
    "a bit of the header": (lambda f: flip(f / SECOND, 60), "IntegrityError", ("rank 1: ", SECOND)),
    "zeros for a page": (
        lambda f: zero(f / SECOND, DATA_START, DATA_START + 512),
        "IntegrityError",
        ("rank 1: ", SECOND, "tensor model.embed_tokens.weight was altered"),
    ),
    "zeros for all tensors": (lambda f: zero(f / FIRST, DATA_START), "IntegrityError", ("rank 0: ", FIRST, "altered")),
    "zeros for the whole file": (lambda f: zero(f / SECOND, 0), "IntegrityError", ("rank 1: ", SECOND)),
    "missing": (lambda f: (f / SECOND).unlink(), "IntegrityError", ("rank 1: ", SECOND, "is missing")),
    "extra": (
        lambda f: shutil.copy(f / FIRST, f / FIRST.replace("00001", "00003", 1)),
        "IntegrityError",
        (FIRST.replace("00001", "00003", 1), "does not belong to this folder"),
    ),
    "swapped": (swap, "IntegrityError", ("rank ", "shard-0000")),
    "twice the same": (lambda f: shutil.copy(f / FIRST, f / SECOND), "IntegrityError", ("rank ", SECOND)),
    "cut short": (lambda f: resize(f / FIRST, -1), "IntegrityError", (FIRST, "bytes, got")),
    "longer": (lambda f: resize(f / SECOND, 1), "IntegrityError", (SECOND, "bytes, got")),
    "a bit of the manifest": (lambda f: flip(f / "reshard.json", -200), "IntegrityError", ("reshard.json",)),
    "no manifest": (lambda f: (f / "reshard.json").unlink(), "BadInputError", ("reshard.json",)),
    "a newer format": (
        lambda f: reseal(f, lambda content: content.update(format_version="3.0", requires=["twist"])),
        "VersionError",
        ("format version 3.0 needs twist",),
    ),
    "another cut": (
        lambda f: reseal(f, lambda content: down_of(content).update(placement={"type": "shard", "dim": 0})),
        "IntegrityError",
        (DOWN, "expected float32 [16, 52] on rank ", "got float32 [32, 26]"),
    ),
    "another dtype": (
        lambda f: reseal(f, lambda content: down_of(content).update(dtype="float16")),
        "IntegrityError",
        (DOWN, "expected float16 [32, 26] on rank ", "got float32 [32, 26]"),
    ),
    "for another number of ranks": (
        lambda f: reseal(f, lambda c: (c["ranks"].append(c["ranks"][0]), c["mesh"].update(tp=3))),
        "TopologyError",
        ("was made for 3 ranks, not for 2",),
    ),
}


@pytest.fixture(scope="module")
def refusals(resharded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str] | None]]:
    """The refusals of two ranks, by damage. "none" is an undamaged folder, loaded last by the same processes."""
    root = tmp_path_factory.mktemp("refusals")
    for name in (*DAMAGED, "none"):
        shutil.copytree(resharded, root / name)
        DAMAGED.get(name, (lambda _: None,))[0](root / name)
    (root / "folders.json").write_text(json.dumps([str(root / name) for name in (*DAMAGED, "none")]))
    done = on_ranks(2, str(WORKER), str(root / "folders.json"), str(root / "out"))
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((root / f"out.{rank}").read_text()) for rank in range(2)]
    return {name: [found[str(root / name)] for found in ranks] for name in (*DAMAGED, "none")}


@pytest.mark.fault(20, 21)
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_load_is_refused_on_all_ranks_alike(damage: str, refusals: dict[str, list[list[str] | None]]) -> None:
    _, kind, mentions = DAMAGED[damage]
    for refusal in refusals[damage]:
        assert refusal is not None
        assert refusal[0] == kind
        for mention in mentions:
            assert mention in refusal[1], refusal
    assert refusals[damage][0] == refusals[damage][1]


def test_a_whole_folder_is_loaded_after_them(refusals: dict[str, list[list[str] | None]]) -> None:
    assert refusals["none"] == [None, None]

"""Changes to checkpoints and comparisons of folders, for the tests of merge and of resharding."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from cli_tools import tree
from safetensors.torch import load_file, save_file

import reshard


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def add(source: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put tensors into the last file of a checkpoint."""
    last = sorted(source.glob("*.safetensors"))[-1]
    save_file(load_file(last) | tensors, last, {"format": "pt"})
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(tensors, last.name)
    index.write_text(json.dumps(content))


def both_ways(source: Path, root: Path, first: dict[str, Any], second: dict[str, Any]) -> None:
    """Convert to `second` by way of `first`, and directly: the results must be equal."""
    reshard.convert(source, root / "first", sync=False, **first)
    reshard.convert(root / "first", root / "second", sync=False, **second)
    reshard.convert(source, root / "at-once", sync=False, **second)
    assert tree(root / "second") == tree(root / "at-once")
    for name in ("first", "second", "at-once"):
        shutil.rmtree(root / name)

"""Which files of a checkpoint folder hold its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from .errors import BadInputError, printable
from .untrusted import read_json, vetted_path

__all__ = ["INDEX_NAME", "SINGLE_NAME", "no_weights", "read_index", "weight_files"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_INDEX_LIMIT = 32 << 20  # bytes: of 300,000 tensors
_PICKLES = re.compile(r".*\.(bin|pth|pt|ckpt)")


def weight_files(root: Path) -> list[str]:
    """The names of the source files, which need not be there yet."""
    return sorted(set(read_index(root).values())) if (root / INDEX_NAME).exists() else [SINGLE_NAME]


def read_index(root: Path) -> dict[str, str]:
    """The `weight_map` of the index: file by tensor. Raises BadInputError, PolicyError."""
    index = read_json(vetted_path(root, INDEX_NAME, what="index"), limit=_INDEX_LIMIT)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInputError(f"{INDEX_NAME}: has no weight_map")
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise BadInputError(f"{INDEX_NAME}: file of {printable(tensor)} is not a name")
        if _PICKLES.fullmatch(file) or not file.endswith(".safetensors"):
            raise BadInputError(f"{INDEX_NAME}: {printable(file)} is not a safetensors file")
    return weight_map


def no_weights(root: Path, names: Iterable[str]) -> BadInputError:
    """What to raise where a folder that holds `names` holds no weights."""
    pickles = [name for name in names if _PICKLES.fullmatch(name)]
    if pickles:
        return BadInputError(
            f"{printable(root)}: weights are pickled ({printable(pickles[0])}), which is never opened",
            hint="load and save it once with transformers to get safetensors files",
        )
    return BadInputError(f"{printable(root)}: no {SINGLE_NAME} and no {INDEX_NAME}")

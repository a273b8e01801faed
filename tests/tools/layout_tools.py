"""Checkpoints in odd layouts: subfolders, variants, copies and odd names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from cli_tools import (
    FIRST,
    INDEX,
    configure,
    file_of,
    rewrite,
    single_file,
    weight_map,
)
from safetensors.torch import load_file

SINGLE = "model.safetensors"


NORM, HEAD = "model.norm.weight", "lm_head.weight"


def weights_in(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of weights, by path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def _twice(source: Path) -> None:
    value = load_file(file_of(source, NORM))[NORM]
    other = next(path for path in sorted(source.glob("model-*")) if path != file_of(source, NORM))
    rewrite(other, lambda tensors: tensors.update({NORM: value}))


def _unindexed(source: Path) -> None:
    _twice(source)
    weight_map(source, lambda found: found.pop(NORM))


def _stale(source: Path) -> None:
    index = (source / INDEX).read_text()
    (single_file(source) / INDEX).write_text(index)


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "an entry too many": (
        lambda s: weight_map(s, lambda found: found.update({"mtp.fc.weight": FIRST})),
        "names 1 tensors that no file holds: mtp.fc.weight",
    ),
    "an entry too few": (lambda s: weight_map(s, lambda found: found.pop(NORM)), "lacks 1 tensors that the files hold"),
    "another file": (
        lambda s: weight_map(s, lambda found: found.update({NORM: FIRST})),
        "names another file for 1 tensors",
    ),
    "a tensor twice": (_twice, f"in two files, with the same bytes: {NORM}"),
    "a tensor twice, and not in the index": (_unindexed, f"in two files, with the same bytes: {NORM}"),
    "a stale index": (_stale, f"{SINGLE} is taken"),
    "an index that is no JSON": (lambda s: (single_file(s) / INDEX).write_text("{"), f"{SINGLE} is taken"),
}


def _into_folder(source: Path, *, index: bool) -> None:
    """Move all files of weights into `parts`, and the index too, unless it is to name them there."""
    (source / "parts").mkdir()
    for path in source.glob("model-*"):
        path.rename(source / "parts" / path.name)
    if index:
        (source / INDEX).rename(source / "parts" / INDEX)
    else:
        weight_map(source, lambda found: found.update({name: f"parts/{file}" for name, file in found.items()}))


def _variant(source: Path) -> None:
    names = {path.name: path.name.replace("model-", "model.fp16-") for path in source.glob("model-*")}
    for old, new in names.items():
        (source / old).rename(source / new)
    weight_map(source, lambda found: found.update({name: names[file] for name, file in found.items()}))
    (source / INDEX).rename(source / "model.safetensors.index.fp16.json")


def _named_by_config(source: Path, name: str) -> None:
    configure(source, transformers_weights=name)
    (source / name).parent.mkdir(exist_ok=True)
    (source / (INDEX if name.endswith(".index.json") else SINGLE)).rename(source / name)


def _one_file(source: Path, name: str) -> None:
    (single_file(source) / name).parent.mkdir(exist_ok=True)
    (source / SINGLE).rename(source / name)


PLACES: dict[str, tuple[Callable[[Path], object], str | None, str | None]] = {
    "the index names a subfolder": (lambda s: _into_folder(s, index=False), None, INDEX),
    "the index is in the subfolder": (lambda s: _into_folder(s, index=True), "parts", INDEX),
    "the same, with a slash": (lambda s: _into_folder(s, index=True), "./parts/", INDEX),
    "one file in a subfolder": (lambda s: _one_file(s, f"parts/{SINGLE}"), "parts", INDEX),
    "one file of a variant": (lambda s: _one_file(s, "model.fp16.safetensors"), "fp16", INDEX),
    "a variant of several files": (_variant, "fp16", INDEX),
    "the index of another name": (
        lambda s: (s / INDEX).rename(s / "other.safetensors.index.json"), "other.safetensors.index.json", INDEX,
    ),
    "one file of another name": (lambda s: _one_file(s, "special.safetensors"), "special.safetensors", INDEX),
    "config.json names a file": (
        lambda s: (single_file(s), _named_by_config(s, "special.safetensors")), None, None,
    ),
    "config.json names an index": (
        lambda s: _named_by_config(s, "x/my.safetensors.index.json"), None, "x/my.safetensors.index.json",
    ),
}  # fmt: skip

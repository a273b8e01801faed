"""Where tensors come from: a checkpoint folder, read through its headers only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .companions import Item, Left, choose
from .errors import BadInputError, listed, printable
from .header import Header, TensorInfo, read_header
from .left_behind import companions, files_here, left_text
from .untrusted import check_plain_name, read_json, vetted_path
from .weights import INDEX_NAME, SINGLE_NAME, no_weights, read_index, weight_files

__all__ = [
    "MANIFEST_NAME",
    "Source",
    "SourceFile",
    "companions_there",
    "is_resharded",
    "model_config",
    "open_source",
]

MANIFEST_NAME = "reshard.json"

_CONFIG_LIMIT = 4 << 20  # bytes: of one that names 100,000 labels


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One source file and its parsed header. `size` in bytes; `mtime_ns` tells whether it changed since."""

    name: str
    path: Path
    size: int
    mtime_ns: int
    header: Header


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint: its files, its tensors by name, its configuration, and by path the small files that go along.

    `notes` are remarks for the user, one line each: what is left behind, and the like. `left` are the files behind.
    """

    root: Path
    files: tuple[SourceFile, ...]
    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    extras: tuple[str, ...]
    repo_id: str | None = None
    commit: str | None = None
    notes: tuple[str, ...] = ()
    left: tuple[Left, ...] = ()

    def file(self, name: str) -> SourceFile:
        return next(file for file in self.files if file.name == name)


def model_config(root: Path) -> dict[str, Any]:
    """The content of `config.json`."""
    config = read_json(vetted_path(root, "config.json", what="model configuration"), limit=_CONFIG_LIMIT)
    if not isinstance(config, dict):
        raise BadInputError(f"{printable(root / 'config.json')}: not a JSON object")
    return config


def open_source(
    root: Path,
    *,
    repo_id: str | None = None,
    commit: str | None = None,
    absent: Mapping[str, SourceFile] = MappingProxyType({}),
    items: Iterable[Item] | None = None,
    include: Sequence[str] = (),
) -> Source:
    """Read a checkpoint folder: `model.safetensors`, or several files and their index. Headers only. Files that are
    `absent` are part of it, though they are not here yet. `items` are all its files where it is elsewhere.
    `include` are patterns of what is to go along too, as for `choose`.

    Raises:
        BadInputError: a file is missing, truncated or malformed, a tensor occurs twice, or files and index disagree.
        PolicyError: a path leads out of the folder.
        UsageError: a pattern of `include` matches nothing.
    """
    if not root.is_dir():
        raise BadInputError(
            f"{printable(root)}: no such folder", hint="give a checkpoint folder, or a Hub id such as org/name"
        )
    if is_resharded(root):
        raise BadInputError(f"{printable(root)}: already resharded", hint="start from the checkpoint it was made from")
    names = sorted({*os.listdir(root), *absent})
    wanted = weight_files(root)
    config = model_config(root)
    if wanted == [SINGLE_NAME] and SINGLE_NAME not in names:
        raise no_weights(root, names)
    if SINGLE_NAME in names and SINGLE_NAME not in wanted:
        raise BadInputError(f"{printable(root)}: holds both {SINGLE_NAME} and an index of other files")
    files = tuple(absent[name] if name in absent else _open_file(root, name) for name in wanted)
    tensors = _merge_headers(files)
    if INDEX_NAME in names:
        _check_index(root, read_index(root), tensors)
    items = files_here(root) if items is None else items
    extras, left = companions(root, items, include=include, read=[*wanted, INDEX_NAME])
    notes = (left_text(extras, left),) if left else ()
    return Source(root, files, tensors, config, extras, repo_id, commit, notes, left)


def companions_there(root: Path, items: Iterable[Item], *, include: Sequence[str] = ()) -> list[str]:
    """Which of the files of a checkpoint that is elsewhere go along, if its index is in `root` already."""
    return list(choose(items, include=include, read=[*weight_files(root), INDEX_NAME])[0])


def is_resharded(root: Path) -> bool:
    """Whether a folder is one of ours, or claims to be."""
    return (root / MANIFEST_NAME).exists()


def _open_file(root: Path, name: str) -> SourceFile:
    check_plain_name(name, what="source file")
    path = vetted_path(root, name, what="source file")
    status = os.stat(path)
    return SourceFile(name, path, status.st_size, status.st_mtime_ns, read_header(path, file=name))


def _merge_headers(files: Iterable[SourceFile]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    twice = []
    for file in files:
        for info in file.header.tensors:
            if info.name in tensors:
                twice.append(f"{printable(info.name)} ({printable(tensors[info.name].file)}, {printable(file.name)})")
            tensors[info.name] = info
    if twice:
        raise BadInputError(f"tensors in two files: {listed(twice)}")
    return tensors


def _check_index(root: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    """Files and index must say the same: neither is picked over the other."""
    wrong = [
        f"{printable(name)} is not in {printable(file)}"
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].file != file
    ]
    wrong += [
        f"{printable(name)} ({printable(info.file)}) is not in the index"
        for name, info in tensors.items()
        if name not in weight_map
    ]
    if wrong:
        raise BadInputError(f"{printable(root / INDEX_NAME)} and the files disagree: {listed(wrong)}")

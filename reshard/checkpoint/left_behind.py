"""The companions of a checkpoint on this machine: found and looked into, and the files left behind told in one line."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import BadInputError, PolicyError, ReshardError, StorageError
from ..files.untrusted import read_json, vetted_path
from ..text import listed, printable
from .companions import Item, Left, choose, walk
from .kinds import known_by_content

__all__ = ["companions", "files_here", "left_text", "refuse_keys"]

_JSON_LIMIT = 4 << 20  # bytes of a file that may name others
_LOOKED_INTO = 1 << 20  # bytes of any file: the whole of a vocabulary of 60 MB would take seconds


def files_here(root: Path) -> Iterator[Item]:
    """Yield the files of a folder on this machine. Links to files are followed as by `vetted_path`, others are not."""

    def look(folder: str) -> tuple[list[Item], list[str]]:
        items, folders = [], []
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.name)
                    else:
                        items.append(_item(root, folder + entry.name, entry))
        except OSError as error:
            if not folder:
                raise StorageError(f"{printable(root)}: {error.strerror}") from None
            return [Item(folder, odd=f"cannot be read: {error.strerror}")], []
        return items, folders

    return walk(look)


def _item(root: Path, path: str, entry: os.DirEntry[str]) -> Item:
    if entry.is_file(follow_symlinks=False):
        return Item(path, entry.stat(follow_symlinks=False).st_size)
    if not entry.is_symlink():
        return Item(path, odd="not a regular file")
    try:
        return Item(path, os.stat(vetted_path(root, path, what="source")).st_size)
    except PolicyError:
        return Item(path, odd="a link that leads out of the folder")
    except (ReshardError, OSError):
        return Item(path, odd="a link to no file")


def companions(
    root: Path, items: Iterable[Item], *, include: Sequence[str] = (), read: Iterable[str] = ()
) -> tuple[tuple[str, ...], tuple[Left, ...]]:
    """Choose companions among the `items` as `choose` does, and look into them: they must be in `root`.

    A file stays behind for what it holds, too. Each file that is left behind gets the names of the companions that
    name it.

    Raises:
        StorageError: a file cannot be read.
        UsageError: as `choose`.
    """
    taken, left = choose(items, include=include, read=read)
    why = {path: known_by_content(_beginning(root, path)) for path in taken}
    why.pop("config.json", None)  # there is no model without it: see `refuse_keys`
    taken = tuple(path for path in taken if not why.get(path))
    found = [*left, *(Left(path, reason) for path, reason in why.items() if reason)]
    named = _named(root, taken, {entry.path for entry in found})
    return taken, tuple(
        replace(entry, named_by=tuple(named[entry.path])) for entry in sorted(found, key=lambda entry: entry.path)
    )


def refuse_keys(root: Path) -> None:
    """Raise PolicyError if `config.json`, which cannot be left behind, is no text, or seems to hold a key."""
    why = known_by_content(_beginning(root, "config.json"))
    if why:
        raise PolicyError(
            f"{printable(root / 'config.json')}: {why}, and it would go along",
            hint="take out what is nobody else's business; no model needs it",
        )


def _beginning(root: Path, path: str) -> bytes:
    real = vetted_path(root, path, what="source")
    try:
        with open(real, "rb", buffering=0) as file:
            return file.read(_LOOKED_INTO)
    except OSError as error:
        raise StorageError(f"{printable(root / path)}: {error.strerror}") from None


def _named(root: Path, taken: Iterable[str], left: set[str]) -> dict[str, list[str]]:
    """Find the files among those `taken` that name a file `left` behind; by the path of the latter."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in taken:
        folder, slash, name = path.rpartition("/")
        if name != "modules.json" and not name.endswith("config.json"):
            continue
        try:
            content = read_json(vetted_path(root, path, what="source"), limit=_JSON_LIMIT)
        except BadInputError:  # the reader that needs the file reports it
            continue
        there = {f"{folder}{slash}{target}" for target in (_modules if name == "modules.json" else _classes)(content)}
        for entry in left:
            if entry in there or (entry.endswith("/") and any(target.startswith(entry) for target in there)):
                found[entry].append(path)
    return found


def _classes(config: Any) -> Iterator[str]:
    """Yield the files of the classes that a configuration of transformers names in `auto_map` and custom pipelines."""
    if not isinstance(config, dict):
        return
    classes = [config.get("auto_map"), config.get("custom_pipelines")]
    while classes:
        value = classes.pop()
        if isinstance(value, dict):
            classes += [item for key, item in value.items() if key not in ("pt", "tf", "default", "type")]
        elif isinstance(value, list):
            classes += value
        elif isinstance(value, str) and "--" not in value:  # "--" is in the classes of another repo
            yield value.rpartition(".")[0].replace(".", "/") + ".py"


def _modules(modules: Any) -> Iterator[str]:
    """Yield the folders and class files that `modules.json` of sentence-transformers names."""
    for module in modules if isinstance(modules, list) else ():
        if isinstance(module, dict):
            if isinstance(module.get("path"), str) and module["path"]:
                yield module["path"].rstrip("/") + "/"
            if isinstance(module.get("type"), str):
                yield from _classes({"auto_map": module["type"]})


def left_text(taken: Iterable[str], left: Sequence[Left]) -> str:
    """Write one line on the files left behind, grouped by reason. A folder is one entry if nothing in it goes along."""
    kept = {path.split("/")[0] for path in taken}
    groups: dict[str, dict[str, None]] = defaultdict(dict)
    lacking: dict[str, list[str]] = defaultdict(list)
    for entry in left:
        top, slash, _ = entry.path.partition("/")
        groups[entry.why][entry.path if top in kept else top + slash] = None
        for name in entry.named_by:
            lacking[name].append(entry.path)
    line = "left behind: " + ", ".join(f"{listed(paths, most=3)} ({why})" for why, paths in groups.items())
    for name, paths in lacking.items():
        line += f"; {printable(name)} names {listed(paths, most=3)}, which OUT lacks"
    return line

"""The source of tensors: a checkpoint folder, read through its headers only."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInputError, PolicyError
from ..files.dtypes import FLOATING, torch_name
from ..files.header import Header, TensorInfo, read_header
from ..files.system import by_errno
from ..files.untrusted import read_json, refuse_error_text, vetted_path
from ..text import printable
from .companions import Item, Left, choose
from .indexed import Read, join
from .left_behind import companions, files_here, left_text
from .weights import AS_FOUND, INDEX_NAME, LINKED, Choice, Weights, adapter_in, find_weights, no_weights

__all__ = [
    "MANIFEST_NAME",
    "Elsewhere",
    "Source",
    "SourceFile",
    "companions_of",
    "dtype_of",
    "is_resharded",
    "model_config",
    "open_source",
    "weights_of",
]

MANIFEST_NAME = "reshard.json"

_CONFIG_LIMIT = 4 << 20  # bytes, enough for 100,000 labels


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

    `left` are the files left behind. `notes` are remarks for the user, one line each: on those files, and others.
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
    """Return the content of `config.json`."""
    config = read_json(vetted_path(root, "config.json", what="model configuration"), limit=_CONFIG_LIMIT)
    if not isinstance(config, dict):
        raise BadInputError(f"{printable(root / 'config.json')}: not a JSON object")
    if "model_type" not in config:
        refuse_error_text(config, printable(root / "config.json"))
    return config


def dtype_of(source: Source) -> str:
    """Return the dtype of `from_pretrained(dtype="auto")`: the config's, else the first floating tensor's."""
    named = source.config.get("dtype") or source.config.get("torch_dtype")
    text = source.config.get("text_config")
    if named is None and isinstance(text, dict):
        named = text.get("dtype") or text.get("torch_dtype")
    if isinstance(named, str) and named.removeprefix("torch.") in FLOATING:
        return named.removeprefix("torch.")
    found = (torch_name(info.dtype, tensor=info.name) for info in source.tensors.values())
    return next((name for name in found if name in FLOATING), "float32")


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A checkpoint only partly on this machine: its `weights`, all its files as `items`, the weight `files` that are
    not here yet, and a function to `read` any bytes of them."""

    weights: Weights
    items: Sequence[Item]
    files: Mapping[str, SourceFile]
    read: Read


def open_source(
    root: Path,
    *,
    choice: Choice = AS_FOUND,
    repo_id: str | None = None,
    commit: str | None = None,
    include: Sequence[str] = (),
    elsewhere: Elsewhere | None = None,
) -> Source:
    """Read a checkpoint folder: `model.safetensors`, or several files and their index, or what is chosen. Only headers
    are read, except both copies of a tensor that is in two files (see `join`). `include` are patterns of further files
    that go along, as for `choose`.

    Raises:
        BadInputError: there are no weights, a file is missing, truncated or malformed, or a tensor is in two files with
            other bytes in each.
        PolicyError: a path leads out of the folder.
        UsageError: a pattern of `include` matches nothing.
    """
    if os.path.isfile(root):
        raise _is_file(root)
    if not root.is_dir():
        raise BadInputError(
            f"{printable(root)}: no such folder", hint="give a checkpoint folder, or a Hub id such as org/name"
        )
    if is_resharded(root):
        raise BadInputError(f"{printable(root)}: already resharded", hint="start from the checkpoint it was made from")
    items = elsewhere.items if elsewhere else tuple(files_here(root))
    weights = elsewhere.weights if elsewhere else weights_of(root, [item.path for item in items], choice=choice)
    config = model_config(root)
    absent: Mapping[str, SourceFile] = elsewhere.files if elsewhere else {}
    files = tuple(absent[name] if name in absent else _open_file(root, name, choice) for name in weights.files)

    def read(name: str, start: int, end: int) -> bytes:
        if elsewhere and name in absent:
            return elsewhere.read(name, start, end)
        return _read(next(file for file in files if file.name == name), start, end)

    tensors, remarks = join({file.name: file.header for file in files}, weights, read)
    extras, left = companions(root, items, include=include, read=_read_of(weights))
    notes = (*weights.notes, *remarks, *([left_text(extras, left)] if left else ()))
    return Source(root, files, tensors, config, extras, repo_id, commit, notes, left)


def companions_of(items: Iterable[Item], weights: Weights, *, include: Sequence[str] = ()) -> list[str]:
    """List the files of a checkpoint elsewhere that go along with its weights."""
    return list(choose(items, include=include, read=_read_of(weights))[0])


def _read_of(weights: Weights) -> list[str]:
    """List the files that are read, for `choose` to pass over. An index that is not read has a note of its own."""
    return [*weights.files, weights.index or INDEX_NAME]


def weights_of(
    root: Path,
    names: Collection[str],
    *,
    place: object = None,
    choice: Choice = AS_FOUND,
    fetch: Callable[[str], object] = lambda _: None,
) -> Weights:
    """Find the weights of a checkpoint that has files of the paths `names`, of which the small ones are in `root`.
    `place` is the name of the checkpoint in messages, if it is elsewhere.

    Raises what `find_weights` does; BadInputError if there are none.
    """
    found = None
    if "config.json" in names or not adapter_in(names):
        found = find_weights(
            root,
            model_config(root),
            lambda path: path in names or os.path.lexists(root / path),
            choice=choice,
            fetch=fetch,
        )
    if found is None:
        raise no_weights(place or root, names, choice=choice, base=_base_of_adapter(root))
    return found


def _is_file(path: Path) -> BadInputError:
    """Return the error for a file in place of a folder."""
    hint = f"give its folder: {printable(path.parent)}"
    if path.name.endswith((".safetensors", ".safetensors.index.json")):
        hint += f" (and --weights {printable(path.name)}, if that has others too)"
    return BadInputError(f"{printable(path)}: is a file", hint=hint)


def _base_of_adapter(root: Path) -> str | None:
    try:
        config = read_json(vetted_path(root, "adapter_config.json", what="adapter"), limit=_CONFIG_LIMIT)
    except (BadInputError, PolicyError):
        return None
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return base if isinstance(base, str) else None


def is_resharded(root: Path) -> bool:
    """Whether a folder is one of ours, or claims to be."""
    return (root / MANIFEST_NAME).exists()


def _open_file(root: Path, name: str, choice: Choice) -> SourceFile:
    if not os.path.lexists(root / name):
        raise BadInputError(f"{printable(root / name)}: is missing", hint="an index names it: fetch it too")
    path = vetted_path(root, name, what="source file", into=choice.into, way_out=LINKED)
    status = os.stat(path)
    return SourceFile(name, path, status.st_size, status.st_mtime_ns, read_header(path, file=name))


def _read(file: SourceFile, start: int, end: int) -> bytes:
    try:
        with open(file.path, "rb") as opened:
            opened.seek(start)
            return opened.read(end - start)
    except OSError as error:
        raise by_errno(error, f"{printable(file.name)}: cannot be read: {error.strerror}", BadInputError) from None

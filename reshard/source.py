"""Where tensors come from: a checkpoint folder, read through its headers only."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import BadInputError, PolicyError, listed, printable
from .header import Header, TensorInfo, read_header

__all__ = [
    "INDEX_NAME",
    "MANIFEST_NAME",
    "NOT_WANTED",
    "SINGLE_NAME",
    "SMALL_FILES",
    "Source",
    "SourceFile",
    "check_plain_name",
    "is_resharded",
    "model_config",
    "open_source",
    "read_json",
    "vetted_path",
    "weight_files",
]

MANIFEST_NAME = "reshard.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

# Bytes of JSON, which in memory are twenty times as many at worst: of a manifest, of an index (of 300,000 tensors), and
# of a configuration (that names 100,000 labels).
_JSON_LIMIT, _INDEX_LIMIT, _CONFIG_LIMIT = 256 << 20, 32 << 20, 4 << 20
# The small files beside the weights (shell patterns); never pickles, never code.
SMALL_FILES = (
    *("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"),
    *("LICEN[CS]E*", "[Ll]icen[cs]e*", "NOTICE*", "[Nn]otice*", "USE_POLICY*"),
)
NOT_WANTED = ("*/*", "adapter_*", "consolidated*")
_PICKLES = re.compile(r".*\.(bin|pth|pt|ckpt)")


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
    """A checkpoint: its files, its tensors by name, its configuration, and the small files that go along.

    `notes` are remarks for the user, one line each: what is left behind, and the like.
    """

    root: Path
    files: tuple[SourceFile, ...]
    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    extras: tuple[str, ...]
    repo_id: str | None = None
    commit: str | None = None
    notes: tuple[str, ...] = ()

    def file(self, name: str) -> SourceFile:
        return next(file for file in self.files if file.name == name)


def check_plain_name(name: str, *, what: str) -> None:
    """Raises PolicyError where a name could lead out of the folder it is used in, or no file can have it."""
    plain = name not in ("", ".", "..") and os.path.basename(name) == name and not {*name} & {"\0", "\\"}
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half a character: JSON can spell it
        plain = False
    if not plain:
        raise PolicyError(f"{what}: {printable(name)} is not a plain file name")


def vetted_path(root: Path, name: str, *, what: str) -> Path:
    """The path of a plain file directly inside `root`.

    A symbolic link is followed only inside `root`, or inside a Hub cache, whose snapshots are links.

    Raises:
        PolicyError: the name or a link leaves the folder.
        BadInputError: there is no such file, or it is not a regular one.
    """
    check_plain_name(name, what=what)
    path = root / name
    try:
        real = Path(os.path.realpath(path, strict=True))
        mode = os.stat(real).st_mode
    except OSError as error:
        raise BadInputError(f"{what}: {printable(path)} cannot be read: {error.strerror}") from None
    if not any(real.is_relative_to(folder) for folder in _inside(root)):
        raise PolicyError(f"{what}: {printable(path)} is a link that leads out of the source folder")
    if not stat.S_ISREG(mode):
        raise BadInputError(f"{what}: {printable(path)} is not a regular file")
    return real


def _inside(root: Path) -> tuple[Path, ...]:
    """The folders that links may lead into: `root`; or where it is in the `models--…/snapshots` of a Hub cache, the
    repo's part of that, and the blobs that its repos share."""
    real = Path(os.path.realpath(root))
    for folder in real.parents:
        if folder.name == "snapshots" and re.match(r"(models|datasets|spaces)--", folder.parent.name):
            return folder.parent, folder.parent.parent / "blobs"
    return (real,)


def read_json(path: Path, *, limit: int = _JSON_LIMIT) -> Any:
    """Parse a JSON file of a checkpoint as data nobody vouches for: of `limit` bytes at most, without duplicate keys.

    Raises:
        BadInputError: not JSON, a key twice, nested too deeply, or absurdly large.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    name = printable(path)
    try:
        if os.stat(path).st_size > limit:
            raise BadInputError(f"{name}: larger than {limit >> 20} MiB")
        return json.loads(path.read_bytes(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{name}: not valid JSON: {printable(error)}") from None
    except OSError as error:
        raise BadInputError(f"{name}: cannot be read: {error.strerror}") from None


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
) -> Source:
    """Read a checkpoint folder: `model.safetensors`, or several files and their index. Headers only. Files that are
    `absent` are part of it, though they are not here yet.

    Raises:
        BadInputError: a file is missing, truncated or malformed, a tensor occurs twice, or files and index disagree.
        PolicyError: a path leads out of the folder.
    """
    if not root.is_dir():
        raise BadInputError(
            f"{printable(root)}: no such folder", hint="give a checkpoint folder, or a Hub id such as org/name"
        )
    names = sorted({*os.listdir(root), *absent})
    wanted = weight_files(root)
    config = model_config(root)
    if wanted == [SINGLE_NAME] and SINGLE_NAME not in names:
        raise _no_weights(root, names)
    if SINGLE_NAME in names and SINGLE_NAME not in wanted:
        raise BadInputError(f"{printable(root)}: holds both {SINGLE_NAME} and an index of other files")
    files = tuple(absent[name] if name in absent else _open_file(root, name) for name in wanted)
    tensors = _merge_headers(files)
    if INDEX_NAME in names:
        _check_index(root, _read_index(root), tensors)
    extras = tuple(name for name in names if _is_copied(name) and not (root / name).is_dir())
    for name in extras:
        vetted_path(root, name, what="source")
    return Source(root, files, tensors, config, extras, repo_id, commit)


def _is_copied(name: str) -> bool:
    def matches(patterns: Iterable[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    return matches(SMALL_FILES) and not matches((*NOT_WANTED, "*.index.json"))


def is_resharded(root: Path) -> bool:
    """Whether a folder is one of ours, or claims to be."""
    return (root / MANIFEST_NAME).exists()


def weight_files(root: Path) -> list[str]:
    """The names of the source files, which need not be there yet. Raises BadInputError for a resharded folder."""
    if is_resharded(root):
        raise BadInputError(f"{printable(root)}: already resharded", hint="start from the checkpoint it was made from")
    return sorted(set(_read_index(root).values())) if (root / INDEX_NAME).exists() else [SINGLE_NAME]


def _no_weights(root: Path, names: Iterable[str]) -> BadInputError:
    pickles = [name for name in names if _PICKLES.fullmatch(name)]
    if pickles:
        return BadInputError(
            f"{printable(root)}: weights are pickled ({printable(pickles[0])}), which is never opened",
            hint="load and save it once with transformers to get safetensors files",
        )
    return BadInputError(f"{printable(root)}: no {SINGLE_NAME} and no {INDEX_NAME}")


def _open_file(root: Path, name: str) -> SourceFile:
    path = vetted_path(root, name, what="source file")
    status = os.stat(path)
    return SourceFile(name, path, status.st_size, status.st_mtime_ns, read_header(path, file=name))


def _read_index(root: Path) -> dict[str, str]:
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

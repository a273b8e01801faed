"""`reshard.json`: what a resharded folder holds. Written last, so a folder that has one is whole. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .digest import ALGORITHM, FileRecord, digest_of
from .dtypes import CODES, FLOATING
from .errors import BadInputError, IntegrityError, VersionError, printable
from .placement import PackedShard, Placement, Replicate, Shard
from .regions import Region, covers, whole
from .source import MANIFEST_NAME, read_json, vetted_path
from .targets import Target

__all__ = ["FORMAT_VERSION", "Manifest", "read_manifest", "sealed_text"]

FORMAT_VERSION = "1.0"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole of `reshard.json`. `source_files` keep each source file's size, digest and header text.

    `runtime_only` says why plain transformers cannot open the folder; empty where it can.
    """

    tool: dict[str, str]
    architecture: str
    model_type: str
    dtype: str
    world_size: int
    repo_id: str | None
    commit: str | None
    source_files: tuple[dict[str, Any], ...]
    parameters: tuple[Target, ...]
    hooks: dict[str, str]
    tied: dict[str, str]
    duplicates: dict[str, str]
    dropped: tuple[str, ...]
    runtime_only: tuple[str, ...]
    rank_files: tuple[FileRecord, ...]
    unused_file: FileRecord | None
    extras: tuple[FileRecord, ...]

    def files(self) -> tuple[FileRecord, ...]:
        """Every file of the folder but the manifest itself."""
        return (*self.rank_files, *((self.unused_file,) if self.unused_file else ()), *self.extras)

    def to_bytes(self) -> bytes:
        """The file's text: the same for the same content, and sealed with its own digest."""
        content = {
            "format": "reshard",
            "format_version": FORMAT_VERSION,
            "tool": self.tool,
            "model": {"architecture": self.architecture, "model_type": self.model_type, "dtype": self.dtype},
            "mesh": {"axes": ["tp"], "shape": [self.world_size]},
            "source": {"repo_id": self.repo_id, "commit": self.commit, "files": list(self.source_files)},
            "parameters": [_parameter_to_json(parameter) for parameter in self.parameters],
            "hooks": self.hooks,
            "tied": self.tied,
            "duplicates": self.duplicates,
            "dropped": list(self.dropped),
            "runtime_only": list(self.runtime_only),
            "digest": ALGORITHM,
            "ranks": [_file_to_json(record) for record in self.rank_files],
            "unused": _file_to_json(self.unused_file) if self.unused_file else None,
            "extras": [_file_to_json(record) for record in self.extras],
        }
        return sealed_text(content)


def sealed_text(content: Mapping[str, Any]) -> bytes:
    """The text of a manifest: a member a line, the last of them the digest of all before it."""
    lines = [f"{json.dumps(key)}: {_lines(value)}" for key, value in content.items()]
    return _close(("{\n" + ",\n".join(lines) + ",\n").encode())


def _close(body: bytes) -> bytes:
    """No byte can change unnoticed: `body` is everything but the seal, which stands last."""
    return body + f'"seal": "{digest_of(body)}"\n}}\n'.encode()


def _lines(value: Any) -> str:
    """JSON with one line for each item of a list of records, so that two manifests can be compared by eye."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"
    return json.dumps(value)


def _file_to_json(record: FileRecord) -> dict[str, Any]:
    content: dict[str, Any] = {"file": record.name, "size": record.size, "digest": record.digest}
    return {**content, "tensors": record.tensors} if record.tensors else content


def _placement_to_json(placement: Placement) -> dict[str, Any]:
    if isinstance(placement, Replicate):
        return {"type": "replicate"}
    if isinstance(placement, Shard):
        copies = {"copies": placement.copies} if placement.copies > 1 else {}
        return {"type": "shard", "dim": placement.dim, **copies}
    return {"type": "packed", "dim": placement.dim, "blocks": list(placement.blocks)}


def _parameter_to_json(record: Target) -> dict[str, Any]:
    content: dict[str, Any] = {
        "name": record.name,
        "shape": list(record.shape),
        "dtype": record.dtype,
        "style": record.style,
        "placement": _placement_to_json(record.placement),
        "from": _regions_to_json(record),
    }
    if record.compute_dtype:
        content["compute_dtype"] = record.compute_dtype
    if record.reason:
        content["reason"] = record.reason
    return content


def _regions_to_json(record: Target) -> Any:
    """A source tensor's name where it is taken as it is, else every region."""
    if len(record.regions) == 1 and record.regions == whole(record.regions[0].source, record.shape):
        return record.regions[0].source
    return [[r.source, r.offset, list(r.strides), list(r.extent), list(r.target_start)] for r in record.regions]


def read_manifest(folder: Path) -> Manifest:
    """Read a resharded folder's manifest.

    Raises:
        BadInputError: there is none, or it is not one of ours.
        VersionError: written in a newer format.
        IntegrityError: its content does not match its seal.
    """
    if not folder.is_dir():
        raise BadInputError(f"{printable(folder)}: no such folder")
    if not (folder / MANIFEST_NAME).exists():
        raise BadInputError(
            f"{printable(folder)}: holds no {MANIFEST_NAME}, so it is not a resharded folder",
            hint="make one with: reshard convert SOURCE OUT --tp-size N",
        )
    path = vetted_path(folder, MANIFEST_NAME, what="manifest")
    try:
        content = read_json(path)
    except BadInputError as error:
        raise IntegrityError(error.message) from None
    if not isinstance(content, dict) or content.get("format") != "reshard":
        raise IntegrityError(f"{printable(path)}: not a manifest of ours")
    version = content.get("format_version")
    if not isinstance(version, str) or version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
        raise VersionError(
            f"{printable(path)}: format version {printable(version)}, this release reads {FORMAT_VERSION}",
            hint="upgrade reshard",
        )
    if content.get("digest") != ALGORITHM:
        raise VersionError(f"{printable(path)}: digests are {printable(content.get('digest'))}, not {ALGORITHM}")
    raw = path.read_bytes()
    if raw != _close(raw[: max(0, raw.rfind(b'"seal": '))]):
        raise IntegrityError(f"{printable(path)}: does not match its seal, so it was altered")
    try:
        return _from_json(content)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise IntegrityError(f"{printable(path)}: incomplete or malformed ({printable(error)})") from None


def _from_json(content: dict[str, Any]) -> Manifest:
    """The manifest, every value checked for its type: a seal shows who wrote last, not that they wrote sense."""
    model, source, mesh = content["model"], content["source"], content["mesh"]
    ranks = tuple(_file(item) for item in content["ranks"])
    if mesh != {"axes": ["tp"], "shape": [len(ranks)]} or not ranks:
        raise ValueError(f"{len(ranks)} rank files for a mesh of {mesh}")
    return Manifest(
        tool=_texts(content["tool"]),
        architecture=_text(model["architecture"]),
        model_type=_text(model["model_type"]),
        dtype=_one_of(FLOATING, model["dtype"]),
        world_size=len(ranks),
        repo_id=_maybe(_text, source["repo_id"]),
        commit=_maybe(_text, source["commit"]),
        source_files=tuple(_source_file(item) for item in source["files"]),
        parameters=tuple(_parameter(item, len(ranks)) for item in content["parameters"]),
        hooks=_texts(content["hooks"]),
        tied=_texts(content["tied"]),
        duplicates=_texts(content["duplicates"]),
        dropped=tuple(map(_text, content["dropped"])),
        runtime_only=tuple(map(_text, content["runtime_only"])),
        rank_files=ranks,
        unused_file=_maybe(_file, content["unused"]),
        extras=tuple(_file(item) for item in content["extras"]),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {value!r}")
    return value


def _texts(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {value!r}")
    return {key: _text(item) for key, item in value.items()}


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a number of at least 0, got {value!r}")
    return value


def _counts(value: Any) -> tuple[int, ...]:
    return tuple(map(_count, value))


def _one_of(known: Collection[str], value: Any) -> str:
    if _text(value) not in known:
        raise ValueError(f"unknown {value!r}")
    return value


def _maybe(read: Callable[[Any], _T], value: Any) -> _T | None:
    return None if value is None else read(value)


def _file(content: dict[str, Any]) -> FileRecord:
    return FileRecord(
        _text(content["file"]), _count(content["size"]), _text(content["digest"]), _texts(content.get("tensors", {}))
    )


def _source_file(content: dict[str, Any]) -> dict[str, Any]:
    kinds = {"file": _text, "size": _count, "digest": _text, "header": _text}
    return {key: read(content[key]) for key, read in kinds.items()}


def _placement(content: dict[str, Any], shape: tuple[int, ...], world_size: int) -> Placement:
    kind = _one_of(("replicate", "shard", "packed"), content["type"])
    if kind == "replicate":
        return Replicate()
    dim = _count(content["dim"])
    if kind == "shard":
        return Shard(range(len(shape))[dim], _ranks_in_a_row(content.get("copies", 1), world_size))
    blocks = _counts(content["blocks"])
    if sum(blocks) != shape[dim]:
        raise ValueError(f"blocks {blocks} in a shape of {shape}")
    return PackedShard(dim, blocks)


def _ranks_in_a_row(copies: Any, world_size: int) -> int:
    if _count(copies) == 0 or world_size % copies:
        raise ValueError(f"{copies} copies on {world_size} ranks")
    return copies


def _parameter(content: dict[str, Any], world_size: int) -> Target:
    shape, origin = _counts(content["shape"]), content["from"]
    if isinstance(origin, str):
        regions = whole(origin, shape)
    else:
        regions = tuple(Region(_text(s), _count(o), *map(_counts, boxes)) for s, o, *boxes in origin)
    if not covers(regions, shape) or any(len(region.strides) != len(shape) for region in regions):
        raise ValueError(f"{content['name']!r} is not filled exactly")
    return Target(
        name=_text(content["name"]),
        shape=shape,
        dtype=_one_of(CODES, content["dtype"]),
        placement=_placement(content["placement"], shape, world_size),
        regions=regions,
        style=_maybe(_text, content["style"]),
        compute_dtype=_maybe(_text, content.get("compute_dtype")),
        reason=_maybe(_text, content.get("reason")),
    )

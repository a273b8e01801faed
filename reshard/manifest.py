"""`reshard.json`: what a resharded folder holds. Written last, so a folder that has one is whole. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .digest import ALGORITHM, digest_of
from .errors import BadInputError, IntegrityError, VersionError, printable
from .placement import PackedShard, Placement, Replicate, Shard
from .regions import Region, whole
from .source import MANIFEST_NAME, read_json, vetted_path
from .targets import Target

__all__ = ["FORMAT_VERSION", "FileRecord", "Manifest", "read_manifest"]

FORMAT_VERSION = "1.0"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of the folder: size in bytes, digest, and the digest of each of its tensors (rank files)."""

    name: str
    size: int
    digest: str
    tensors: dict[str, str]


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
        lines = [f"{json.dumps(key)}: {_lines(value)}" for key, value in {**content, "seal": _seal(content)}.items()]
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _lines(value: Any) -> str:
    """JSON with one line for each item of a list of records, so that two manifests can be compared by eye."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"
    return json.dumps(value)


def _seal(content: Mapping[str, Any]) -> str:
    return digest_of(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def _file_to_json(record: FileRecord) -> dict[str, Any]:
    content: dict[str, Any] = {"file": record.name, "size": record.size, "digest": record.digest}
    return {**content, "tensors": record.tensors} if record.tensors else content


def _file_from_json(content: dict[str, Any]) -> FileRecord:
    return FileRecord(content["file"], content["size"], content["digest"], content.get("tensors", {}))


def _placement_to_json(placement: Placement) -> dict[str, Any]:
    if isinstance(placement, Replicate):
        return {"type": "replicate"}
    if isinstance(placement, Shard):
        return {"type": "shard", "dim": placement.dim}
    return {"type": "packed", "dim": placement.dim, "blocks": list(placement.blocks)}


def _placement_from_json(content: dict[str, Any]) -> Placement:
    if content["type"] == "replicate":
        return Replicate()
    if content["type"] == "shard":
        return Shard(content["dim"])
    if content["type"] == "packed":
        return PackedShard(content["dim"], tuple(content["blocks"]))
    raise ValueError(f"unknown placement {content['type']}")


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


def _parameter_from_json(content: dict[str, Any]) -> Target:
    shape = tuple(content["shape"])
    origin = content["from"]
    regions = (
        whole(origin, shape)
        if isinstance(origin, str)
        else tuple(Region(s, o, tuple(st), tuple(e), tuple(t)) for s, o, st, e, t in origin)
    )
    return Target(
        name=content["name"],
        shape=shape,
        dtype=content["dtype"],
        placement=_placement_from_json(content["placement"]),
        regions=regions,
        style=content["style"],
        compute_dtype=content.get("compute_dtype"),
        reason=content.get("reason"),
    )


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
        raise BadInputError(f"{printable(path)}: not a manifest of ours")
    version = content.get("format_version")
    if not isinstance(version, str) or version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
        raise VersionError(
            f"{printable(path)}: format version {printable(version)}, this release reads {FORMAT_VERSION}",
            hint="upgrade reshard",
        )
    seal = content.pop("seal", None)
    if seal != _seal(content):
        raise IntegrityError(f"{printable(path)}: does not match its seal, so it was altered")
    try:
        return _from_json(content)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise IntegrityError(f"{printable(path)}: incomplete or malformed ({printable(error)})") from None


def _from_json(content: dict[str, Any]) -> Manifest:
    model, source = content["model"], content["source"]
    return Manifest(
        content["tool"],
        model["architecture"],
        model["model_type"],
        model["dtype"],
        content["mesh"]["shape"][0],
        source["repo_id"],
        source["commit"],
        tuple(source["files"]),
        tuple(_parameter_from_json(item) for item in content["parameters"]),
        content["hooks"],
        content["tied"],
        content["duplicates"],
        tuple(content["dropped"]),
        tuple(content["runtime_only"]),
        tuple(_file_from_json(item) for item in content["ranks"]),
        _file_from_json(content["unused"]) if content["unused"] else None,
        tuple(_file_from_json(item) for item in content["extras"]),
    )

"""The manifest, `reshard.json`. It is written last, so a folder that has one is complete. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.companions import Left
from ..checkpoint.source import MANIFEST_NAME
from ..errors import BadInputError, IntegrityError, TopologyError, UsageError, VersionError
from ..files.digest import ALGORITHM, digest_of
from ..files.dtypes import FLOATING
from ..files.untrusted import UnknownError, count, maybe, one_of, read_json, text, texts, vetted_path
from ..sharding.topology import Topology
from ..text import printable
from .bundle_json import Quantizations
from .manifest_json import (
    Names,
    bundle_to_json,
    bundles_from_json,
    derived_from_json,
    file_from_json,
    file_to_json,
    groups_from_json,
    parameter_from_json,
    parameter_to_json,
    served_by_json,
    source_file_from_json,
)
from .placement_json import Cuts
from .rank_file import FileRecord
from .report import replicated_bytes, rows
from .targets import Bundle, LocalTensor, Target, rank_tensors
from .versions import check_known, check_version, version_members

__all__ = [
    "REFERENCE_NAME",
    "Manifest",
    "is_sealed",
    "manifest_at",
    "read_manifest",
    "reference_record",
    "refuse_engine",
    "sealed_text",
]

REFERENCE_NAME = "reference.logits"  # one of the extras: a safetensors file that no reader may take for weights


@dataclass(frozen=True, slots=True, repr=False)
class Manifest:
    """The content of `reshard.json`. `source_files` keep the size, digest and header text of each source file.

    `hooks` maps each module to its style. `custom` names the classes of the styles that are not built in.
    `runtime_only` says why plain transformers cannot open the folder; it is empty if it can. `extras` are named by
    path. `groups` gives, by attention, the query heads for each KV head on every rank, if ranks differ; else the model
    has the number. `bundles` are the quantized parameters, whose tensors are among the `parameters`. `engine` says
    which other engine the rank files are for, if any; `parameters` are then the tensors of that engine, those of all
    ranks one after the other. `derived` says how the checkpoint of the `source_files` was computed from another, and
    has the files of that one: those of the source may be nowhere. `left` are the source files that were left behind:
    known when the folder is made, but not written.
    """

    tool: dict[str, str]
    architecture: str
    model_type: str
    dtype: str
    topology: Topology
    repo_id: str | None
    commit: str | None
    source_files: tuple[dict[str, Any], ...]
    parameters: tuple[Target, ...]
    hooks: dict[str, str]
    custom: dict[str, str]
    tied: dict[str, str]
    duplicates: dict[str, str]
    dropped: tuple[str, ...]
    runtime_only: tuple[str, ...]
    rank_files: tuple[FileRecord, ...]
    unused_file: FileRecord | None
    extras: tuple[FileRecord, ...]
    groups: dict[str, tuple[int, ...]] = field(default_factory=dict)
    bundles: tuple[Bundle, ...] = ()
    engine: dict[str, Any] | None = None
    derived: dict[str, Any] | None = None
    left: tuple[Left, ...] = field(default=(), compare=False)

    @property
    def world_size(self) -> int:
        return self.topology.world_size

    @property
    def of_model(self) -> tuple[Target, ...]:
        """The model's own parameters: a quantized one in the place of its tensors."""
        inside = {name for bundle in self.bundles for name in bundle.quantized.members}
        plain = (parameter for parameter in self.parameters if parameter.name not in inside)
        return (*plain, *(bundle.target for bundle in self.bundles))

    def tensors_of(self, rank: int) -> tuple[LocalTensor, ...]:
        """Return the tensors of a rank's file. An engine's rank may have no part of a parameter."""
        found = rank_tensors(self.parameters, rank=rank, world_size=self.world_size)
        return tuple(tensor for tensor in found if tensor.regions) if self.engine else found

    def files(self) -> tuple[FileRecord, ...]:
        """Return the record of every file of the folder except the manifest."""
        return (*self.rank_files, *((self.unused_file,) if self.unused_file else ()), *self.extras)

    def to_dict(self) -> dict[str, Any]:
        """Return what `reshard inspect --format json` prints: names, numbers, lists and dicts of them."""
        return {
            "architecture": self.architecture,
            "dtype": self.dtype,
            "world_size": self.world_size,
            "mesh": self.topology.to_json(),
            "source": {"repo_id": self.repo_id, "commit": self.commit},
            "tool": self.tool,
            "parameters": rows(self.parameters, self.bundles, self.world_size),
            "replicated_bytes": replicated_bytes(self.parameters),
            "ranks": [{"file": f.name, "size": f.size, "digest": f.digest} for f in self.rank_files],
            "extras": [record.name for record in self.extras],
            "tied": self.tied,
            "unused": list(self.unused_file.tensors) if self.unused_file else [],
            "dropped": list(self.dropped),
            "custom_strategies": self.custom,
            "runtime_only": list(self.runtime_only),
            **({"engine": self.engine} if self.engine else {}),
            **({"derived": self.derived} if self.derived else {}),
        }

    def __repr__(self) -> str:
        size = sum(record.size for record in self.rank_files)
        of = f"{self.architecture} ({self.dtype})"
        return f"<Manifest of {printable(of)} for {self.topology}: {len(self.parameters)} parameters, {size:,} bytes>"

    def to_bytes(self) -> bytes:
        """Return the file's text: the same for the same content, and sealed with its own digest."""
        cuts = Cuts()
        parameters = _Listed(parameter_to_json(parameter, cuts) for parameter in self.parameters)
        quantizations = Quantizations()
        version = version_members(self)
        names = Names() if "names" in version.get("requires", ()) else None
        ranks = _Listed(file_to_json(record, names) for record in self.rank_files)
        bundles = [bundle_to_json(bundle, cuts, quantizations) for bundle in self.bundles]
        content = {
            "format": "reshard",
            **version,
            "tool": self.tool,
            "model": {"architecture": self.architecture, "model_type": self.model_type, "dtype": self.dtype},
            "mesh": self.topology.to_json(),
            "source": {"repo_id": self.repo_id, "commit": self.commit, "files": list(self.source_files)},
            **({"cuts": cuts.to_json(), "key_value_groups": self.groups} if cuts else {}),
            "parameters": parameters,
            **({"quantizations": quantizations.to_json(), "bundles": bundles} if bundles else {}),
            **({"engine": self.engine} if self.engine else {}),
            **({"derived": self.derived} if self.derived else {}),
            "hooks": self.hooks,
            "custom_strategies": self.custom,
            "tied": self.tied,
            "duplicates": self.duplicates,
            "dropped": list(self.dropped),
            "runtime_only": list(self.runtime_only),
            "digest": ALGORITHM,
            **({"names": names.to_json()} if names else {}),
            "ranks": ranks,
            "unused": file_to_json(self.unused_file) if self.unused_file else None,
            "extras": [file_to_json(record) for record in self.extras],
        }
        return sealed_text(content)


def sealed_text(content: Mapping[str, Any]) -> bytes:
    """Return the text of a manifest: one member a line, the last of them the digest of all before it."""
    body = bytearray(b"{\n")
    for key, value in content.items():
        body += f"{json.dumps(key)}: ".encode()
        for piece in _pieces(value):
            body += piece.encode()
        body += b",\n"
    body += _seal(body)
    return bytes(body)


def is_sealed(raw: bytes) -> bool:
    """Whether a text of `sealed_text` is as it was written."""
    end = max(0, raw.rfind(b'"seal": '))
    return raw[end:] == _seal(memoryview(raw)[:end])


def _seal(body: bytearray | memoryview) -> bytes:
    """Return the end of a text of which `body` is everything before it, so that no byte can change unnoticed."""
    return f'"seal": "{digest_of(body)}"\n}}\n'.encode()


class _Listed:
    """A list of records that are made into lines as they come: as dicts, all at once, they take several times as much
    memory, and there may be hundreds of thousands of regions. The text is not made at once either."""

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self.lines = [json.dumps(record) for record in records]


def _pieces(value: Any) -> Iterator[str]:
    """Yield JSON, one line for each item of a list of records, so that two manifests can be compared by eye."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = _Listed(value)
    if not isinstance(value, _Listed) or not value.lines:
        yield "[]" if isinstance(value, _Listed) else json.dumps(value)
        return
    yield "[\n"
    for number, line in enumerate(value.lines):
        yield f",\n{line}" if number else line
    yield "\n]"


def read_manifest(folder: Path) -> Manifest:
    """Read a resharded folder's manifest.

    Raises:
        BadInputError: there is no such folder, or no manifest in it.
        VersionError: it is in a newer format, or holds what this release does not know.
        IntegrityError: it is not a manifest of ours, does not match its seal, or is malformed.
    """
    if not folder.is_dir():
        raise BadInputError(f"{printable(folder)}: no such folder", hint="reshard pull fetches one from elsewhere")
    if not (folder / MANIFEST_NAME).exists():
        raise BadInputError(
            f"{printable(folder)}: holds no {MANIFEST_NAME}, so it is not a resharded folder",
            hint="make one with: reshard convert SOURCE OUT --tp-size N",
        )
    vetted_path(folder, MANIFEST_NAME, what="manifest")
    return manifest_at(folder / MANIFEST_NAME)


def manifest_at(path: Path) -> Manifest:
    """Read the manifest in a file, whatever its name. Raises what `read_manifest` does."""
    try:
        content = read_json(path)
    except BadInputError as error:
        raise IntegrityError(error.message) from None
    if not isinstance(content, dict) or content.get("format") != "reshard":
        raise IntegrityError(f"{printable(path)}: not a manifest of ours")
    version = content.get("format_version")
    check_version(version, where=printable(path))
    if content.get("digest") != ALGORITHM:
        raise VersionError(f"{printable(path)}: digests are {printable(content.get('digest'))}, not {ALGORITHM}")
    if not is_sealed(path.read_bytes()):
        raise IntegrityError(f"{printable(path)}: does not match its seal, so it was altered")
    try:
        check_known(content)
        return _from_json(content)
    except UnknownError as error:
        raise VersionError(
            f"{printable(path)}: format version {version} {error}, which this release does not know",
            hint="upgrade reshard",
        ) from None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, TopologyError) as error:
        raise IntegrityError(f"{printable(path)}: incomplete or malformed ({printable(error)})") from None


def refuse_engine(folder: Path, manifest: Manifest) -> None:
    """Raise BadInputError if a folder has rank files of another engine: they are neither cut again nor run here."""
    if manifest.engine is not None:
        raise BadInputError(
            f"{printable(folder)}: has rank files that only {printable(manifest.engine['name'])} reads",
            hint="start from the checkpoint that they were made from",
        )


def _from_json(content: dict[str, Any]) -> Manifest:
    """Build the manifest and check the type of every value: a seal shows who wrote last, not that they wrote sense."""
    model, source, mesh = content["model"], content["source"], content["mesh"]
    names = Names.from_json(content["names"]) if "names" in content else None
    ranks = tuple(file_from_json(item, names) for item in content["ranks"])
    topology = Topology(count(mesh["tp"]), count(mesh.get("ep", 1)))
    if topology.world_size != len(ranks):
        raise ValueError(f"{len(ranks)} rank files for a mesh of {mesh}")
    cuts = Cuts.from_json(content.get("cuts", ()))
    parameters = tuple(parameter_from_json(item, len(ranks), cuts) for item in content["parameters"])
    return Manifest(
        tool=texts(content["tool"]),
        architecture=text(model["architecture"]),
        model_type=text(model["model_type"]),
        dtype=one_of(FLOATING, model["dtype"]),
        topology=topology,
        repo_id=maybe(text, source["repo_id"]),
        commit=maybe(text, source["commit"]),
        source_files=tuple(source_file_from_json(item) for item in source["files"]),
        parameters=parameters,
        hooks=texts(content["hooks"]),
        custom=texts(content["custom_strategies"]),
        tied=texts(content["tied"]),
        duplicates=texts(content["duplicates"]),
        dropped=tuple(map(text, content["dropped"])),
        runtime_only=tuple(map(text, content["runtime_only"])),
        rank_files=ranks,
        unused_file=maybe(file_from_json, content["unused"]),
        extras=tuple(file_from_json(item) for item in content["extras"]),
        groups={
            text(name): groups_from_json(of, len(ranks)) for name, of in content.get("key_value_groups", {}).items()
        },
        bundles=bundles_from_json(content, parameters, len(ranks), cuts),
        engine=maybe(served_by_json, content.get("engine")),
        derived=maybe(derived_from_json, content.get("derived")),
    )


def reference_record(folder: Path, manifest: Manifest) -> FileRecord:
    """Return the record of a folder's reference logits. Raises UsageError if it was written without them."""
    for extra in manifest.extras:
        if extra.name == REFERENCE_NAME:
            return extra
    raise UsageError(
        f"{printable(folder)}: holds no reference logits to compare with",
        hint="give its source: --reference SOURCE; or store them: reshard convert … --reference-logits",
    )

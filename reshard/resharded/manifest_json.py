"""The parts of a manifest as JSON, and back: every value's type is checked. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..checkpoint.quantization import QUANTIZATIONS
from ..files.dtypes import CODES, FLOATING
from ..files.untrusted import UnknownError, count, counts, maybe, one_of, text, texts
from ..sharding.regions import Region, covers, whole
from ..text import printable
from .bundle_json import Quantizations, check_members
from .placement_json import Cuts, placement_from_json, placement_to_json
from .rank_file import Digests, FileRecord
from .targets import Bundle, Target

__all__ = [
    "ENGINES",
    "Names",
    "bundle_to_json",
    "bundles_from_json",
    "derived_from_json",
    "engine_from_json",
    "file_from_json",
    "file_to_json",
    "groups_from_json",
    "parameter_from_json",
    "parameter_to_json",
    "served_by_json",
    "source_file_from_json",
]

ENGINES = ("vllm",)
_ENGINE_TEXTS = ("name", "version", "torch", "platform", "dtype", "architecture")


class Names:
    """The manifest's table of the names of tensors, for folders of very many: ranks that hold the same share an entry.

    The record of such a file has its digests in one text. With a name for each digest, the manifest of 64 ranks with
    99,999 tensors each has 584 MB of JSON, which no reader takes, and with a table 232 MB.
    """

    def __init__(self, names: Iterable[tuple[str, ...]] = ()) -> None:
        self._names = list(names)
        self._numbers = {of_file: number for number, of_file in enumerate(self._names)}

    @classmethod
    def from_json(cls, content: Iterable[Iterable[Any]]) -> Names:
        """Read the table. Raises ValueError or TypeError if it makes no sense."""
        found = [tuple(map(text, of_file)) for of_file in content]
        if any(len(set(of_file)) < len(of_file) for of_file in found):
            raise ValueError("a tensor is named twice")
        return cls(found)

    def to_json(self) -> list[list[str]]:
        return list(map(list, self._names))

    def refer(self, tensors: Mapping[str, str]) -> dict[str, Any]:
        """Return the digests of a file's tensors as members of its record, and add their names if they are new."""
        number = self._numbers.setdefault(tuple(tensors), len(self._names))
        if number == len(self._names):
            self._names.append(tuple(tensors))
        return {"names": number, "digests": "".join(tensors.values())}

    def find(self, content: Mapping[str, Any]) -> Digests:
        """Return the digests that a record refers to. Raises ValueError, TypeError, KeyError or IndexError."""
        return Digests(self._names[count(content["names"])], text(content["digests"]))


def file_to_json(record: FileRecord, names: Names | None = None) -> dict[str, Any]:
    """Return the record of a file as the manifest has it. If there are `names`, those of its tensors go there."""
    content: dict[str, Any] = {"file": record.name, "size": record.size, "digest": record.digest}
    if not record.tensors:
        return content
    return {**content, **names.refer(record.tensors)} if names else {**content, "tensors": dict(record.tensors)}


def parameter_to_json(record: Target, cuts: Cuts) -> dict[str, Any]:
    """Return a parameter as the manifest has it. Cuts that many share go into `cuts`."""
    content: dict[str, Any] = {
        "name": record.name,
        "shape": list(record.shape),
        "dtype": record.dtype,
        "style": record.style,
        "placement": placement_to_json(record.placement, cuts),
        "from": _regions_to_json(record),
    }
    if record.compute_dtype:
        content["compute_dtype"] = record.compute_dtype
    if record.reason:
        content["reason"] = record.reason
    return content


def bundle_to_json(record: Bundle, cuts: Cuts, quantizations: Quantizations) -> dict[str, Any]:
    """Return a quantized parameter as the manifest has it. Formats that many share go into `quantizations`."""
    return {**parameter_to_json(record.target, cuts), **quantizations.refer(record.quantized)}


def _regions_to_json(record: Target) -> Any:
    """Return a source tensor's name if it is taken as it is, otherwise every region."""
    if len(record.regions) == 1 and record.regions == whole(record.regions[0].source, record.shape):
        return record.regions[0].source
    return [[r.source, r.offset, list(r.strides), list(r.extent), list(r.target_start)] for r in record.regions]


def engine_from_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a manifest, or a copy plan, says of the engine that rank files are for."""
    found: dict[str, Any] = {name: text(content[name]) for name in _ENGINE_TEXTS}
    found |= {name: maybe(text, content[name]) for name in ("quantization", "moe_backend")}
    found |= {name: count(content[name]) for name in ("tp", "pp")}
    one_of(ENGINES, found["name"])
    if 0 in (found["tp"], found["pp"]):
        raise ValueError("no ranks")
    if type(content["ep"]) is not bool:
        raise ValueError("ep is true or false")
    capability = maybe(counts, content["capability"])
    if capability is not None and len(capability) != 2:
        raise ValueError(f"compute capability {capability}")
    return {**found, "ep": content["ep"], "capability": capability and list(capability)}


def served_by_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a manifest says of its engine: with the dtypes that it takes source tensors for."""
    taken_for = {name: one_of(CODES, dtype) for name, dtype in texts(content["taken_for"]).items()}
    return {**engine_from_json(content), "taken_for": taken_for}


def derived_from_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a manifest says of the checkpoint that its source was computed from."""
    kinds = {"file": text, "size": count, "digest": text}
    if type(content["experts"]) is not bool or (content["quantized"] is None) == (content["dequantized"] is None):
        raise ValueError("either quantized or dequantized, and experts is true or false")
    if content["quantized"] not in (None, *QUANTIZATIONS):
        raise UnknownError(f"is quantized to {printable(content['quantized'])}")
    return {
        **{name: maybe(text, content[name]) for name in ("quantized", "dequantized")},
        "experts": content["experts"],
        "dtype": maybe(lambda name: one_of(FLOATING, name), content["dtype"]),
        "files": [{key: read(file[key]) for key, read in kinds.items()} for file in content["files"]],
    }


def file_from_json(content: dict[str, Any], names: Names | None = None) -> FileRecord:
    """Return the record of a file. Raises ValueError, TypeError, KeyError or IndexError, as all readers below do."""
    tensors = names.find(content) if names and "names" in content else texts(content.get("tensors", {}))
    return FileRecord(text(content["file"]), count(content["size"]), text(content["digest"]), tensors)


def groups_from_json(content: Any, world_size: int) -> tuple[int, ...]:
    """Return the query heads of a KV head, for each rank."""
    groups = counts(content)
    if len(groups) != world_size or 0 in groups:
        raise ValueError(f"query heads of a KV head: {groups}")
    return groups


def source_file_from_json(content: dict[str, Any]) -> dict[str, Any]:
    """Return what is recorded of a source file."""
    kinds = {"file": text, "size": count, "digest": text, "header": text}
    return {key: read(content[key]) for key, read in kinds.items()}


def parameter_from_json(content: dict[str, Any], world_size: int, cuts: Cuts) -> Target:
    """Return a parameter, which its regions must fill exactly."""
    shape, origin = counts(content["shape"]), content["from"]
    if isinstance(origin, str):
        regions = whole(origin, shape)
    else:
        regions = tuple(Region(text(s), count(o), *map(counts, boxes)) for s, o, *boxes in origin)
    if not covers(regions, shape) or any(len(region.strides) != len(shape) for region in regions):
        raise ValueError(f"{content['name']!r} is not filled exactly")
    return Target(
        name=text(content["name"]),
        shape=shape,
        dtype=one_of(CODES, content["dtype"]),
        placement=placement_from_json(content["placement"], shape, world_size, cuts),
        regions=regions,
        style=maybe(text, content["style"]),
        compute_dtype=maybe(text, content.get("compute_dtype")),
        reason=maybe(text, content.get("reason")),
    )


_OF_BUNDLES = {
    *("name", "shape", "dtype", "style", "placement", "from", "compute_dtype", "reason"),
    *("quantization", "members", "blocks", "lengths"),
}


def bundles_from_json(
    content: dict[str, Any], parameters: tuple[Target, ...], world_size: int, cuts: Cuts
) -> tuple[Bundle, ...]:
    """Return the quantized parameters, whose tensors must be among `parameters`."""
    quantizations = Quantizations.from_json(content.get("quantizations", ()))
    tensors = {parameter.name: parameter for parameter in parameters}
    found = []
    for item in content.get("bundles", ()):
        if unknown := sorted(item.keys() - _OF_BUNDLES):
            raise UnknownError(f"has a bundle with {printable(unknown[0])}")
        target = parameter_from_json(item, world_size, cuts)
        one_of(FLOATING, target.dtype)
        quantized = quantizations.find(item, target.shape)
        check_members(target, quantized, tensors, world_size)
        found.append(Bundle(target, quantized))
    return tuple(found)

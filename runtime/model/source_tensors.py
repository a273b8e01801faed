"""Source tensors from the model's parameters that hold their elements: regions, read the other way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from reshard.errors import IntegrityError
from reshard.files.dtypes import CODES, torch_name, widest
from reshard.files.header import TensorInfo, parse_header
from reshard.resharded.manifest import Manifest
from reshard.resharded.targets import LocalTensor, Target
from reshard.sharding.regions import Region, is_run
from reshard.text import printable

__all__ = ["Group", "groups"]

Parts = tuple[tuple[str, Region], ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters of the model, and the source tensors whose elements are in these parameters and in no others.

    `parts` are the parameters that hold the elements of each of `sources`, by its name, and the regions. If source
    tensors were equal, the model was made from one of them, and its parts stand for all.
    """

    targets: tuple[Target, ...]
    sources: tuple[LocalTensor, ...]
    parts: dict[str, Parts]

    def source(self, made: LocalTensor, wholes: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Make a source tensor from the full parameters, by their names."""
        source = torch.empty(made.shape, dtype=getattr(torch, made.dtype))
        for name, region in self.parts[made.name]:
            box = tuple(slice(start, start + size) for start, size in zip(region.target_start, region.extent))
            source.view(-1).as_strided(region.extent, region.strides, region.offset).copy_(wholes[name][box])
        return source


def groups(manifest: Manifest, *, quantized: bool = False) -> list[Group]:
    """Return the groups of the model, in its order. A source tensor has its own dtype, unless it was cast.

    If `quantized`, the parameters are those that the files hold. Else a quantized matrix is one parameter: as a
    checkpoint that is not quantized has it, in the dtype that the model computes in.

    Raises IntegrityError if an element of a source tensor is not in the model.
    """
    sources = {info.name: info for info in _sources(manifest, quantized=quantized)}
    held = manifest.parameters if quantized else manifest.of_model
    parts: dict[str, list[tuple[str, Region]]] = defaultdict(list)
    dtypes: dict[str, set[str]] = defaultdict(set)
    for target in held:
        own = {
            region.source: torch_name(sources[region.source].dtype, tensor=region.source) for region in target.regions
        }
        kept = target.dtype == widest(own.values())  # the dtype that holds all of them: none was cast
        for region in target.regions:
            parts[region.source].append((target.name, _unrepeated(region)))
            dtypes[region.source].add(own[region.source] if kept else target.dtype)
    equal: dict[str, list[str]] = defaultdict(list)
    for name in sources:
        equal[manifest.duplicates.get(name, name)].append(name)
    found = []
    for targets in _connected(held):
        made: dict[str, LocalTensor] = {}
        for name in dict.fromkeys(region.source for target in targets for region in target.regions):
            _check_covered(sources[name], parts[name])
            stored = torch_name(sources[name].dtype, tensor=name)
            dtype = stored if stored in dtypes[name] else min(dtypes[name])
            made |= {one: LocalTensor(one, sources[one].shape, dtype, (), ()) for one in equal[name]}
        owned = {one: tuple(parts[manifest.duplicates.get(one, one)]) for one in made}
        found.append(Group(targets, tuple(made.values()), owned))
    return found


def _sources(manifest: Manifest, *, quantized: bool) -> Iterator[TensorInfo]:
    for file in manifest.source_files:
        text = file["header"].encode(errors="surrogatepass")
        yield from parse_header(text, file=file["file"], file_size=file["size"]).tensors
    for bundle in () if quantized else manifest.bundles:
        for region in bundle.target.regions:
            shape = region.extent if len(bundle.target.regions) == 1 else region.extent[-2:]
            yield TensorInfo(region.source, CODES[bundle.target.dtype], shape, "", 0, 0)


def _connected(parameters: Iterable[Target]) -> list[tuple[Target, ...]]:
    """Group parameters so that no source tensor has elements in two groups. Most groups have one parameter."""
    groups: dict[int, list[Target]] = {}
    group_of: dict[str, int] = {}
    for number, target in enumerate(parameters):
        names = {region.source for region in target.regions}
        groups[number] = [target]
        for other in sorted({group_of[name] for name in names if name in group_of}):
            names |= {region.source for one in groups[other] for region in one.regions}
            groups[number] = [*groups.pop(other), *groups[number]]
        group_of |= dict.fromkeys(names, number)
    return [tuple(group) for group in groups.values()]


def _unrepeated(region: Region) -> Region:
    """Return the part of a region that holds each of its elements once."""
    return replace(region, extent=tuple(1 if s == 0 else e for e, s in zip(region.extent, region.strides)))


def _check_covered(info: TensorInfo, parts: Iterable[tuple[str, Region]]) -> None:
    regions = {(region.offset, region.strides, region.extent): region for _, region in parts}
    size = torch.Size(info.shape).numel()
    covered = len(regions) == 1 and all(is_run(region) and region.size == size for region in regions.values())
    if not covered:  # rare: mark them, one byte for each element
        marked = torch.zeros(size, dtype=torch.bool)
        for offset, strides, extent in regions:
            marked.as_strided(extent, strides, offset).fill_(True)
        covered = bool(marked.all())
    if not covered:
        raise IntegrityError(f"{printable(info.name)}: not every element of it is in the model")

"""The plan of a resharded folder for another number of ranks, from its manifest: no model is built, no torch imported.

The manifest notes the style of each parameter, and how it was cut. The cut of a style is the same rule for any number
of ranks, but heads must stay whole, and the manifest does not note their numbers. They are not needed where an even cut
is certain: from the cuts of the ranks before, or from the numbers in config.json. Where it is not, and where anything
else depends on the model, the answer is None, and `build_plan` plans with the model. Both give the same plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoint.source import dtype_of
from ..files.dtypes import widest
from ..resharded.as_source import Resharded
from ..resharded.layout import FileLayout, file_layouts
from ..resharded.manifest import Manifest
from ..resharded.targets import Target
from ..resharded.versions import version_members
from ..sharding.dealing import placement_of_heads
from ..sharding.placement import Nested, PackedShard, Placement, Ranges, Replicate, Shard
from ..sharding.topology import Topology
from ..strategies.registry import heads_in, is_built_in
from .model.heads import FUSED, KEYS, VALUES, attentions, is_query, query_of
from .remarks import dtypes_of, mixed_note, partly_note, runtime_only, why_whole

__all__ = ["Recut", "recut"]

_KNOWN = {
    "copies",
    "cuts",
    "derived",
    "names",
    "subfolders",
}  # of the manifest's features: others, such as bundles, bear on a cut
_Heads = tuple[int, int]  # numbers of query heads and of KV heads
_Group = Sequence[tuple[Target, str]]  # the parameters of an attention, each with its projection


@dataclass(frozen=True, slots=True)
class Recut:
    """The plan of a folder for other ranks: `manifest` is what is to be written, less the records of the files.

    `layouts` are filled from the folder's rank files. `notes` are remarks for the user, one line each.
    """

    manifest: Manifest
    layouts: list[FileLayout]
    notes: tuple[str, ...]


def recut(made: Resharded, topology: Topology) -> Recut | None:
    """Plan a folder for the ranks of `topology`, by the plan that it was made with. None if the manifest does not tell.

    Raises BadInputError if the folder lacks what a rank file needs.
    """
    manifest, ranks = made.manifest, topology.tp
    if not (_is_plain(manifest, topology) and _is_by_name(made) and _is_as_stored(made)):
        return None
    before = runtime_only(manifest.parameters, manifest.tied, (), manifest.world_size)
    heads = _heads_by_parameter(manifest, made.source.config, ranks)
    if heads is None or manifest.runtime_only[: len(before)] != tuple(before):
        return None
    parameters = []
    for target in manifest.parameters:
        placement = _placement(target, heads.get(target.name), ranks)
        if placement is None:
            return None
        reason = why_whole(target.style, topology) if isinstance(placement, Replicate) else None
        parameters.append(replace(target, placement=placement, reason=reason))
    unused = tuple(manifest.unused_file.tensors) if manifest.unused_file else ()
    layouts = file_layouts(parameters, ranks, made.source, unused)
    taken = {region.source for target in parameters for region in target.regions}
    return Recut(
        replace(
            manifest,
            topology=topology,
            parameters=tuple(parameters),
            runtime_only=(*runtime_only(parameters, manifest.tied, (), ranks), *manifest.runtime_only[len(before) :]),
            groups={},
        ),
        [made.relocated(layout) for layout in layouts],
        (*mixed_note(parameters, made.source), *partly_note([name for name in unused if name in taken])),
    )


def _is_plain(manifest: Manifest, topology: Topology) -> bool:
    """Whether built-in styles cut all, over one axis, and nothing was left out."""
    return (
        topology.ep == manifest.topology.ep == 1
        and not manifest.custom
        and not any(map(heads_in, manifest.hooks.values()))
        and all(map(is_built_in, {*manifest.hooks.values(), *(t.style for t in manifest.parameters if t.style)}))
        and not manifest.dropped
        and set(version_members(manifest).get("requires", ())) <= _KNOWN
        and (topology.tp == 1 or any(target.style for target in manifest.parameters))
    )


def _is_by_name(made: Resharded) -> bool:
    """Whether the model has the class that config.json names and the names of the checkpoint: else there are remarks
    to make, which need the model."""
    names = made.source.config.get("architectures") or [made.manifest.architecture]
    if not isinstance(names, list):
        return False
    parameters = {*made.manifest.tied, *(target.name for target in made.manifest.parameters)}
    return made.manifest.architecture in names and not parameters.isdisjoint(made.source.tensors)


def _is_as_stored(made: Resharded) -> bool:
    """Whether all parameters have the dtypes of the checkpoint: none was cast."""
    dtypes = ((target.dtype, dtypes_of(target.regions, made.source)) for target in made.manifest.parameters)
    return made.manifest.dtype == dtype_of(made.source) and all(
        not found or dtype == widest(found) for dtype, found in dtypes
    )


def _placement(target: Target, heads: tuple[_Heads, bool] | None, ranks: int) -> Placement | None:
    placement = target.placement
    if isinstance(placement, (Replicate, PackedShard)):
        return placement
    dim = _dim(placement)
    if dim is None or (heads is None and not isinstance(placement, Shard)):
        return None
    if heads is not None:
        (query, key_value), is_its = heads
        unit, left = divmod(target.shape[dim], query if is_its else key_value)
        if not left:
            return placement_of_heads(query, key_value, is_query=is_its, dim=dim, unit=unit, ranks=ranks)
    return Shard(dim)


def _dim(placement: Placement) -> int | None:
    """Return the one dim that heads are cut along; None if the placement can be no cut of heads."""
    if isinstance(placement, Nested):
        whole = isinstance(placement.inner, Replicate) and isinstance(placement.outer, Shard)
        return placement.outer.dim if whole else None
    return placement.dim if isinstance(placement, (Shard, Ranges)) else None


def _heads_by_parameter(
    manifest: Manifest, config: Mapping[str, Any], ranks: int
) -> dict[str, tuple[_Heads, bool]] | None:
    """Return the heads of every parameter that an attention shares among its heads, and whether it has the query heads;
    None if they cannot be told, or are not dealt evenly to `ranks`."""
    targets = {target.name: target for target in manifest.parameters}
    alike = {**targets, **{name: targets[owner] for name, owner in manifest.tied.items() if owner in targets}}
    styles = {name: target.style for name, target in alike.items() if target.style}
    groups = attentions(styles, {name: target.shape for name, target in alike.items()})
    copies = Counter(target.regions for target in manifest.parameters)
    found: dict[str, tuple[_Heads, bool]] = {}
    for members in groups.values():
        query = query_of(members.values())
        if query is None:
            continue
        # Whether a tied parameter stays with its owner depends on the heads of both.
        if not members.keys() <= targets.keys() or not members.keys().isdisjoint(manifest.tied.values()):
            return None
        group = [(targets[name], projection) for name, projection in members.items()]
        if any(copies[target.regions] > 1 for target, _ in group):
            return None
        heads = _even_heads(group, query, manifest.world_size, config, ranks)
        if heads is None:
            return None
        found |= {name: (heads, is_query(projection)) for name, projection in members.items()}
    return found


def _even_heads(group: _Group, query: str, before: int, config: Mapping[str, Any], ranks: int) -> _Heads | None:
    """Return numbers of query heads and of KV heads by which an attention is dealt evenly to `ranks`; None if unsure.

    They may be numbers of blocks of whole heads: where a deal is even, this makes no difference.
    """
    if ranks == 1:
        return 1, 1
    found = _blocks(group, before) if before % ranks == 0 else None
    found = found or _counted(group, query, config, ranks)
    if found is None or found[0] % ranks:
        return None
    key_value = found[1]
    # Fewer KV heads than ranks are shared, which not every attention can: this one did if there were fewer before.
    return found if key_value % ranks == 0 or (ranks % key_value == 0 and key_value < before) else None


def _blocks(group: _Group, before: int) -> _Heads | None:
    """Return the blocks of heads that the ranks before held, if all held as much.

    Ranks in a row share one KV head, as a rank that needs several shares none of them.
    """
    found = {before}
    for target, _ in group:
        placement, dim = target.placement, _dim(target.placement)
        if dim is None or isinstance(placement, Ranges):
            return None
        parts = before // placement.row if isinstance(placement, Nested) else before
        if target.shape[dim] % parts:
            return None
        found.add(parts)
    return (before, min(found)) if len(found) <= 2 else None


def _counted(group: _Group, query: str, config: Mapping[str, Any], ranks: int) -> _Heads | None:
    """Return the numbers of heads that config.json gives, if the sizes of the projections agree, and `ranks` divides
    every number of heads there is in it, except that of the KV heads."""
    if query in FUSED:  # their blocks may be fewer than the heads
        return None
    sizes = {projection: target.shape[_dim(target.placement) or 0] for target, projection in group}
    key = next((name for name in (*KEYS, *VALUES) if name in sizes), None)
    pairs = set()
    for level in _levels(config):
        count = _number(level.get("num_attention_heads"))
        key_value = _number((level.get("num_key_value_heads") if key else None) or count)
        agree = key is None or sizes[key] * count == sizes[query] * key_value
        if count and key_value and agree and count % key_value == 0 and sizes[query] % count == 0:
            pairs.add((count, key_value))
    shared = {key_value for _, key_value in pairs} if len(pairs) == 1 else set()
    if any(number % ranks for number in _numbers_of_heads(config) if number not in shared):
        return None
    return min(pairs, default=None)


def _levels(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _levels(value)


def _number(value: Any) -> int:
    """Return a value that is a positive number, else 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _numbers_of_heads(config: Mapping[str, Any]) -> Iterator[int]:
    def numbers(value: Any) -> Iterator[int]:
        if _number(value):
            yield value
        for item in value if isinstance(value, Sequence) and not isinstance(value, str) else ():
            yield from numbers(item)

    for level in _levels(config):
        for key, value in level.items():
            if "heads" in key or key == "n_head":
                yield from numbers(value)

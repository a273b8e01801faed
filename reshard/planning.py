"""The plan: what every rank file will hold, from which regions. Frozen data, made from headers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from .dtypes import FLOATING, torch_name
from .errors import BadInputError, TopologyError, printable
from .model import Model, Parameter
from .placement import PackedShard, Placement, Replicate, Shard, shard_bounds
from .regions import Region
from .source import Source
from .strategies import ALL_PARALLEL_STYLES, ParallelInterface
from .targets import Target

__all__ = ["ReshardPlan", "build_plan", "legal_sizes"]

_LARGEST = 64  # ranks looked at when listing the legal sizes


@dataclass(frozen=True, slots=True)
class ReshardPlan:
    """Everything `convert` will do. `runtime_only` says why plain transformers cannot open the folder, if it cannot.

    `tied` parameters share the tensor of their owner. `duplicates` are source tensors equal to another that is stored.
    """

    source: Source
    model: Model
    world_size: int
    targets: tuple[Target, ...]
    tied: dict[str, str]
    duplicates: dict[str, str]
    unused: tuple[str, ...]
    dropped: tuple[str, ...]
    runtime_only: tuple[str, ...]


def build_plan(
    source: Source,
    model: Model,
    world_size: int,
    *,
    cast: bool = False,
    drop_unused: bool = False,
    strategies: ParallelInterface = ALL_PARALLEL_STYLES,
    equal: Callable[[str, str], bool] | None = None,
) -> ReshardPlan:
    """Plan a checkpoint for `world_size` ranks. Integers only; no tensor data is read, except by `equal`.

    `cast` stores every floating tensor in the dtype the model wants (`--dtype`). `equal` compares two source tensors
    that the model ties though the checkpoint holds both; without it they are taken to be equal.

    Raises:
        TopologyError: the model does not allow this many ranks.
        BadInputError: an unknown style, or parameters that the checkpoint lacks.
    """
    if model.missing:
        some = ", ".join(map(printable, model.missing[:3]))
        raise BadInputError(f"the checkpoint lacks {len(model.missing)} parameters of {model.architecture}: {some}")
    for style in model.hooks.values():
        strategies.find(style)
    placements = _placements(model, strategies, world_size)
    reason = _refusal(model, placements, world_size)
    if reason:
        sizes = [size for size, why in legal_sizes(model, strategies=strategies).items() if why is None]
        raise TopologyError(
            f"{world_size} ranks do not fit {model.architecture}: {reason}", hint=f"legal sizes: {_join(sizes)}"
        )
    regions, tied, duplicates, apart = _tie(model, placements, equal)
    targets = tuple(
        _target(parameter, placements[parameter.name], regions[parameter.name], source, cast)
        for parameter in model.parameters
        if parameter.name in regions
    )
    return ReshardPlan(
        source,
        model,
        world_size,
        targets,
        tied,
        duplicates,
        unused=() if drop_unused else model.unused,
        dropped=model.unused if drop_unused else (),
        runtime_only=(*_runtime_only(targets, tied, world_size), *apart),
    )


def _placements(model: Model, strategies: ParallelInterface, world_size: int) -> dict[str, Placement]:
    return {parameter.name: _placement(parameter, strategies, world_size) for parameter in model.parameters}


def _placement(parameter: Parameter, strategies: ParallelInterface, world_size: int) -> Placement:
    if parameter.style is None:
        return Replicate()
    own_name = parameter.name.rpartition(".")[2]
    try:
        placement = strategies.find(parameter.style).placement(own_name, parameter.shape)
        if isinstance(placement, Shard) and parameter.shared and parameter.heads:
            return replace(placement, copies=_copies(parameter.heads, world_size))
        return placement
    except ValueError as error:
        raise BadInputError(f"{printable(parameter.name)}: {parameter.style}: {error}") from None


def _target(
    parameter: Parameter, placement: Placement, regions: tuple[Region, ...], source: Source, cast: bool
) -> Target:
    codes = {source.tensors[region.source].dtype for region in regions}
    if len(codes) > 1:
        raise BadInputError(
            f"{printable(parameter.name)}: made of tensors of different dtypes ({', '.join(sorted(codes))})"
        )
    stored = torch_name(codes.pop(), tensor=parameter.name) if codes else parameter.dtype
    reason = None
    if isinstance(placement, Replicate):
        reason = "no rule in the tp_plan" if parameter.style is None else f"{parameter.style} keeps it whole"
    if stored in FLOATING and stored != parameter.dtype:
        if cast:
            stored = parameter.dtype
        else:
            return Target(
                parameter.name, parameter.shape, stored, placement, regions, parameter.style, parameter.dtype, reason
            )
    return Target(parameter.name, parameter.shape, stored, placement, regions, parameter.style, None, reason)


def _tie(
    model: Model, placements: Mapping[str, Placement], equal: Callable[[str, str], bool] | None
) -> tuple[dict[str, tuple[Region, ...]], dict[str, str], dict[str, str], tuple[str, ...]]:
    """Store a tied tensor once, under its owner. It stays apart where the checkpoint or the ranks hold it differently.

    transformers ties whichever way the checkpoint allows: when only the tied name is present, the owner takes its data.
    """
    regions, tied, duplicates, apart = dict(model.regions), {}, {}, []
    for name, owner in model.tied.items():
        if owner not in regions:
            if name not in regions:
                raise BadInputError(
                    f"the checkpoint lacks {printable(owner)}, and {printable(name)} which is tied to it"
                )
            regions[owner] = regions[name]
        elif name in regions:
            one, other = regions[name], regions[owner]
            if len(one) != 1 or len(other) != 1 or (equal and not equal(one[0].source, other[0].source)):
                apart.append(f"{name} is tied to {owner}, but the checkpoint holds different values")
                continue
            duplicates[one[0].source] = other[0].source
        if placements[name] == placements[owner]:
            regions.pop(name, None)
            tied[name] = owner
        else:
            regions[name] = regions[owner]
    return regions, tied, duplicates, tuple(apart)


def _runtime_only(targets: Iterable[Target], tied: Mapping[str, str], world_size: int) -> list[str]:
    """Why transformers' own loader for rank files (torch's distributed checkpoint) cannot open the folder."""
    reasons = []
    packed = [target.name for target in targets if isinstance(target.placement, PackedShard)]
    if packed and world_size > 1:
        reasons.append(f"{len(packed)} packed parameters are not one box per rank ({packed[0]} …)")
    reasons += [f"{name} is tied to {owner} and stored once, but it looks for both" for name, owner in tied.items()]
    return reasons


def _copies(heads: int, world_size: int) -> int:
    """How many ranks in a row hold the same KV head: one, or where there are more ranks than heads, their share."""
    return world_size // heads if world_size > heads and world_size % heads == 0 else 1


def _refusal(model: Model, placements: Mapping[str, Placement], world_size: int) -> str | None:
    """Why the model cannot run on `world_size` ranks, or None."""
    if world_size < 1:
        return "there must be at least one"
    for parameter in model.parameters:
        placement = placements[parameter.name]
        if isinstance(placement, Replicate):
            continue
        copies = placement.copies if isinstance(placement, Shard) else 1
        if parameter.heads and parameter.heads % (world_size // copies):
            return f"the {parameter.heads} heads of {printable(parameter.name)} do not divide"
        if parameter.style == "embedding_rowwise":
            start, stop = shard_bounds(parameter.shape[0], rank=world_size - 1, world_size=world_size)
            if start == stop:
                return f"the {parameter.shape[0]} rows of {printable(parameter.name)} leave a rank without any"
    return None


def legal_sizes(
    model: Model, *, strategies: ParallelInterface = ALL_PARALLEL_STYLES, most: int = _LARGEST
) -> dict[int, str | None]:
    """For each number of ranks up to `most`: None where it fits, else why it does not."""
    sizes = range(1, most + 1)
    return {size: _refusal(model, _placements(model, strategies, size), size) for size in sizes}


def _join(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sizes))

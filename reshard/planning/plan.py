"""The plan: what every rank file will hold, from which regions. Frozen data, made from headers alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint.source import Source
from ..errors import BadInputError, TopologyError, listed, printable
from ..files.dtypes import is_floating, itemsize, widest
from ..resharded.targets import Target, partly_used
from ..sharding.placement import Nested, PackedShard, Placement, Replicate, Shard, is_box, local_shape, shared
from ..sharding.regions import Region
from ..sharding.topology import Topology
from ..strategies import ALL_PARALLEL_STYLES, ParallelInterface, TensorParallelLayer
from .model import Model, Parameter
from .remarks import dtypes_of, mixed_note, partly_note

__all__ = ["ReshardPlan", "build_plan", "legal_sizes", "smallest_fit"]

_LEAST_MEANT = 1 << 20  # bytes of a GPU: fewer are a number without its unit
_LARGEST = 64  # ranks looked at when listing the legal sizes


@dataclass(frozen=True, slots=True, repr=False)
class ReshardPlan:
    """Everything `convert` will do. `runtime_only` says why plain transformers cannot open the folder, if it cannot.

    `tied` parameters share the tensor of their owner. `duplicates` are source tensors equal to another that is stored.
    `unused` are kept apart: what no parameter takes, and whole what one takes a part of, so that all can be given back.
    `custom` styles, by name, are of the named classes. `notes` are remarks for the user, one line each: `plan` and
    `convert` show them.
    """

    source: Source
    model: Model
    topology: Topology
    targets: tuple[Target, ...]
    tied: dict[str, str]
    duplicates: dict[str, str]
    unused: tuple[str, ...]
    dropped: tuple[str, ...]
    runtime_only: tuple[str, ...]
    custom: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return self.topology.world_size

    def to_dict(self) -> dict[str, Any]:
        """What `reshard plan --format json` prints: names, numbers, lists and dicts of them."""
        from .report import plan_report

        return plan_report(self)

    def __repr__(self) -> str:
        of = f"{self.model.architecture} ({self.model.dtype})"
        return f"<ReshardPlan of {printable(of)} for {self.topology}: {len(self.targets)} parameters>"


def build_plan(
    source: Source,
    model: Model,
    topology: Topology,
    *,
    cast: bool = False,
    drop_unused: bool = False,
    strategies: ParallelInterface = ALL_PARALLEL_STYLES,
    equal: Callable[[str, str], bool] | None = None,
) -> ReshardPlan:
    """Plan a checkpoint for the ranks of `topology`. Integers only; no tensor data is read, except by `equal`.

    `cast` stores every floating tensor in the dtype the model wants (`--dtype`). `equal` compares two source tensors
    that the model ties though the checkpoint holds both; without it they are taken to be equal.

    Raises:
        TopologyError: the model does not allow this many ranks, or has no plan for more than one.
        BadInputError: an unknown style, a rule that cuts nothing, or parameters that the checkpoint lacks.
    """
    if model.missing:
        raise BadInputError(
            f"the checkpoint lacks {len(model.missing)} parameters of {model.architecture}: {listed(model.missing)}",
            hint="; ".join(model.notes) or None,
        )
    _check_styles(model, strategies)
    reason = _refusal(model, strategies, topology)
    if reason:
        sizes = [size for size, why in legal_sizes(model, strategies=strategies).items() if why is None]
        raise TopologyError(
            f"{topology} do not fit {model.architecture}: {reason}",
            hint=f"legal sizes: {_join(sizes)}" if _has_plan(model) else "give it a plan with --plan FILE",
        )
    placements = {parameter.name: _placement(parameter, strategies, topology) for parameter in model.parameters}
    regions, tied, duplicates, apart = _tie(model, placements, equal)
    targets = tuple(
        _target(parameter, placements[parameter.name], regions[parameter.name], source, topology, cast)
        for parameter in model.parameters
        if parameter.name in regions
    )
    partly = partly_used(source, (region for found in model.regions.values() for region in found))
    return ReshardPlan(
        source,
        model,
        topology,
        targets,
        tied,
        duplicates,
        unused=(*(() if drop_unused else model.unused), *partly),
        dropped=model.unused if drop_unused else (),
        runtime_only=(*_runtime_only(targets, tied, topology.world_size), *apart),
        custom=strategies.custom({*model.hooks.values(), *(p.style for p in model.parameters if p.style)}),
        notes=(*model.notes, *mixed_note(targets, source), *partly_note(partly), *source.notes),
    )


def _check_styles(model: Model, strategies: ParallelInterface) -> None:
    """Every style is known, and a rule the user wrote for a module that only holds others does not cut in vain."""
    holders = {parameter.name.rpartition(".")[0] for parameter in model.parameters}
    for module, style in model.hooks.items():
        strategy = strategies.find(style)
        if module in model.manual and module not in holders and _cuts(strategy):
            raise BadInputError(
                f"the rule {printable(module)} → {printable(style)} cuts nothing: it has no parameters of its own",
                hint="name the modules inside it",
            )


def _cuts(strategy: TensorParallelLayer) -> bool:
    try:
        return not isinstance(strategy.placement("weight", (8, 8)), Replicate)
    except ValueError:  # blocks that 8 does not hold
        return True


def _placement(parameter: Parameter, strategies: ParallelInterface, topology: Topology) -> Placement:
    try:
        if parameter.expert_style and topology.ep > 1:
            return _expert_placement(parameter, parameter.expert_style, strategies, topology)
        if parameter.style is None or topology.tp == 1 < topology.world_size:
            return Replicate()
        copies = _copies(parameter, topology.tp)
        placement = _cut(parameter, parameter.style, strategies, parameter.shape, topology.tp // copies)
        return shared(placement, topology.tp_row * copies)
    except ValueError as error:
        raise BadInputError(f"{printable(parameter.name)}: {parameter.style}: {error}") from None


def _cut(
    parameter: Parameter, style: str, strategies: ParallelInterface, shape: tuple[int, ...], ranks: int
) -> Placement:
    own_name = parameter.name.rpartition(".")[2]
    return strategies.find(style).placement_on(own_name, shape, getattr(torch, parameter.dtype), ranks)


def _expert_placement(
    parameter: Parameter, expert_style: str, strategies: ParallelInterface, topology: Topology
) -> Placement:
    """Cut by expert over the ep axis; where ranks share their experts, by the tensor-parallel rule among them."""
    outer = _cut(parameter, expert_style, strategies, parameter.shape, topology.ep)
    if topology.ep_row == 1 or not isinstance(outer, Shard):
        return outer
    held = local_shape(outer, parameter.shape, rank=0, world_size=topology.ep)
    inner = _cut(parameter, parameter.style, strategies, held, topology.ep_row) if parameter.style else Replicate()
    if not isinstance(inner, (Shard, PackedShard)):
        raise TopologyError(
            f"{topology}: {printable(parameter.name)} has no rule that cuts it for the {topology.ep_row} ranks that"
            " would share its experts",
            hint=f"use --ep-size {topology.world_size}",
        )
    return Nested(outer, inner, topology.ep_row)


def _copies(parameter: Parameter, tp: int) -> int:
    """How many ranks in a row hold the same KV head: one, or where there are more ranks than heads, their share."""
    heads = parameter.heads if parameter.shared else None
    return tp // heads if heads and tp > heads and tp % heads == 0 else 1


def _target(
    parameter: Parameter,
    placement: Placement,
    regions: tuple[Region, ...],
    source: Source,
    topology: Topology,
    cast: bool,
) -> Target:
    dtypes = dtypes_of(regions, source)
    stored = widest(dtypes) if dtypes else parameter.dtype
    if stored is None:
        raise BadInputError(
            f"{printable(parameter.name)}: made of tensors of different dtypes ({', '.join(sorted(dtypes))})"
        )
    compute_dtype = None
    if is_floating(stored) and stored != parameter.dtype:
        stored, compute_dtype = (parameter.dtype, None) if cast else (stored, parameter.dtype)
    style = parameter.expert_style or parameter.style
    reason = _why_whole(parameter, topology) if isinstance(placement, Replicate) else None
    return Target(parameter.name, parameter.shape, stored, placement, regions, style, compute_dtype, reason)


def _why_whole(parameter: Parameter, topology: Topology) -> str:
    if parameter.style is None:
        return "no rule in the tp_plan"
    return "tp is 1" if topology.tp == 1 < topology.world_size else f"{parameter.style} keeps it whole"


def _tie(
    model: Model, placements: Mapping[str, Placement], equal: Callable[[str, str], bool] | None
) -> tuple[dict[str, tuple[Region, ...]], dict[str, str], dict[str, str], tuple[str, ...]]:
    """Store a tied tensor once, under its owner. It stays apart where the checkpoint or the ranks hold it differently.

    transformers ties whichever way the checkpoint allows: if the owner is not there, the first of those tied to it that
    is gives all of them its data.
    """
    regions, tied, duplicates, apart = dict(model.regions), {}, {}, []
    for name, owner in model.tied.items():
        if owner not in regions:
            regions[owner] = next(regions[one] for one in model.tied if one in regions and model.tied[one] == owner)
        if name in regions and regions[name] != regions[owner]:
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
    scattered = [target.name for target in targets if not is_box(target.placement)]
    if scattered and world_size > 1:
        reasons.append(f"{len(scattered)} parameters are not one box per rank ({scattered[0]} …)")
    reasons += [f"{name} is tied to {owner} and stored once, but it looks for both" for name, owner in tied.items()]
    return reasons


def _has_plan(model: Model) -> bool:
    return any(parameter.style for parameter in model.parameters)


def _refusal(model: Model, strategies: ParallelInterface, topology: Topology) -> str | None:
    """Why the model cannot run on these ranks, or None."""
    if topology.tp > 1 and not _has_plan(model):
        return "it has no tensor-parallel plan, so every rank would hold all of it"
    for parameter in model.parameters:
        heads, experts = parameter.heads, parameter.shape[:1] if parameter.expert_style else ()
        if heads and heads % (topology.tp // _copies(parameter, topology.tp)):
            return f"the {heads} heads of {printable(parameter.name)} do not divide"
        if experts and experts[0] % topology.ep:
            return f"the {experts[0]} experts of {printable(parameter.name)} do not divide"
        if parameter.style == "embedding_rowwise":
            last = {"rank": topology.world_size - 1, "world_size": topology.world_size}
            if not local_shape(_placement(parameter, strategies, topology), parameter.shape, **last)[0]:
                return f"the {parameter.shape[0]} rows of {printable(parameter.name)} leave a rank without any"
    return None


def legal_sizes(
    model: Model, *, strategies: ParallelInterface = ALL_PARALLEL_STYLES, most: int = _LARGEST
) -> dict[int, str | None]:
    """For each number of tensor-parallel ranks up to `most`: None where it fits, else why it does not."""
    return {size: _refusal(model, strategies, Topology(size)) for size in range(1, most + 1)}


def smallest_fit(model: Model, strategies: ParallelInterface, *, ep: int, memory: int) -> Topology:
    """The fewest tensor-parallel ranks with `ep` that the model allows, none of which holds more than `memory` bytes of
    weights. Raises TopologyError where there are none."""
    least = None
    for tp in range(1, _LARGEST + 1):
        if tp % ep and ep % tp:
            continue
        topology = Topology(tp, ep)
        if _refusal(model, strategies, topology) is None:
            least = _largest_part(model, strategies, topology)
            if least <= memory:
                return topology
    if least is None:
        raise TopologyError(f"no number of ranks with ep {ep} fits {model.architecture}")
    raise TopologyError(
        f"{model.architecture}: no number of ranks up to {_LARGEST} brings the weights of each under {memory:,} bytes;"
        f" the most have {least:,}",
        hint="what is whole on every rank is listed by reshard plan --tp-size N"
        if memory >= _LEAST_MEANT
        else "24 GB are 24e9 bytes, or --gpu-memory 24GB",
    )


def _largest_part(model: Model, strategies: ParallelInterface, topology: Topology) -> int:
    """Bytes of the parameters of rank 0, which has the largest part of each, as torch.chunk cuts."""
    first = {"rank": 0, "world_size": topology.world_size}
    return sum(
        math.prod(local_shape(_placement(parameter, strategies, topology), parameter.shape, **first))
        * itemsize(parameter.dtype)
        for parameter in model.parameters
        if parameter.name not in model.tied
    )


def _join(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sizes))

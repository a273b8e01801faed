"""How each parameter is cut over the ranks: its placement."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import torch

from ..errors import BadInputError, TopologyError
from ..sharding.dealing import deal, in_units, placement_of_heads, placement_of_ranges
from ..sharding.placement import (
    Nested,
    PackedShard,
    Placement,
    Ranges,
    Replicate,
    Shard,
    local_shape,
    ranges_of,
    shared,
)
from ..sharding.topology import Topology
from ..strategies import TensorParallelLayer
from ..strategies.registry import ParallelInterface
from ..strategies.tracing import placement_on
from ..text import printable
from .model.model import Parameter

__all__ = ["does_cut", "groups_on", "placement_of"]


def does_cut(strategy: TensorParallelLayer) -> bool:
    """Whether a strategy cuts a weight at all."""
    try:
        return not isinstance(strategy.placement("weight", (8, 8)), Replicate)
    except ValueError:  # 8 elements cannot be packed in its blocks
        return True


def placement_of(parameter: Parameter, strategies: ParallelInterface, topology: Topology) -> Placement:
    """Return the placement of a parameter, by its style. Raises BadInputError or TopologyError if there is none."""
    try:
        if parameter.expert_style and topology.ep > 1:
            return _expert_placement(parameter, parameter.expert_style, strategies, topology)
        if parameter.style is None or topology.tp == 1 < topology.world_size:
            return Replicate()
        placement = _cut(parameter, parameter.style, strategies, parameter.shape, topology.tp)
        if parameter.heads and isinstance(placement, (Shard, PackedShard)):
            placement = _by_heads(parameter, placement, topology.tp)
        return shared(placement, topology.tp_row)
    except ValueError as error:
        raise BadInputError(f"{printable(parameter.name)}: {parameter.style}: {error}") from None


def _by_heads(parameter: Parameter, placement: Shard | PackedShard, ranks: int) -> Placement:
    heads, dim = parameter.heads, placement.dim
    assert heads is not None
    if isinstance(placement, PackedShard):  # blocks that hold all heads each
        dealt = heads.dealt(ranks).held(is_query=heads.is_query)
        starts = [0, *itertools.accumulate(placement.blocks)]
        held = tuple(
            tuple(
                (first + low * size // heads.count, first + high * size // heads.count)
                for first, size in zip(starts, placement.blocks)
                for low, high in dealt[rank]
            )
            for rank in range(ranks)
        )
        size = parameter.shape[dim]
        even = all(held[r] == tuple(ranges_of(placement, size, rank=r, world_size=ranks)) for r in range(ranks))
        return placement if even else placement_of_ranges(dim, size, held)
    return placement_of_heads(
        heads.query,
        heads.key_value,
        is_query=heads.is_query,
        dim=dim,
        unit=parameter.shape[dim] // heads.count,
        ranks=ranks,
        together=heads.together,
    )


def _cut(
    parameter: Parameter, style: str, strategies: ParallelInterface, shape: tuple[int, ...], ranks: int
) -> Placement:
    own_name = parameter.name.rpartition(".")[2]
    placement = placement_on(strategies.find(style), own_name, shape, getattr(torch, parameter.dtype), ranks)
    if parameter.unit == 1 or style != parameter.style or not isinstance(placement, (Shard, PackedShard)):
        return placement
    return in_units(placement, shape[placement.dim], parameter.unit, ranks)


def _expert_placement(
    parameter: Parameter, expert_style: str, strategies: ParallelInterface, topology: Topology
) -> Placement:
    """Cut by expert over the ep axis. If ranks share their experts, the tensor-parallel rule cuts these among them."""
    outer = _cut(parameter, expert_style, strategies, parameter.shape, topology.ep)
    if not isinstance(outer, Shard):
        return outer
    experts = parameter.shape[outer.dim]
    dealt = placement_of_ranges(outer.dim, experts, [(part,) for part in deal(experts, topology.ep)])
    if topology.ep_row == 1 or not isinstance(dealt, (Shard, Ranges)):
        return dealt
    held = local_shape(dealt, parameter.shape, rank=0, world_size=topology.ep)
    inner = _cut(parameter, parameter.style, strategies, held, topology.ep_row) if parameter.style else Replicate()
    if not isinstance(inner, (Shard, PackedShard, Ranges)):
        raise TopologyError(
            f"{topology}: {printable(parameter.name)} has no rule that cuts it for the {topology.ep_row} ranks that"
            " would share its experts",
            hint=f"use --ep-size {topology.world_size}",
        )
    return Nested(dealt, inner, topology.ep_row)


def groups_on(
    parameters: Iterable[Parameter], placements: Mapping[str, Placement], topology: Topology
) -> dict[str, tuple[int, ...]]:
    """Return, by attention, the query heads for each KV head on every rank, where a plain placement does not tell."""
    found = {}
    for parameter in parameters:
        heads = parameter.heads
        if heads and heads.shareable and isinstance(placements[parameter.name], Ranges):
            groups = heads.dealt(topology.tp).groups
            if set(groups) != {heads.query // heads.key_value}:
                found[heads.attention] = tuple(size for size in groups for _ in range(topology.tp_row))
    return found

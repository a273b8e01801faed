"""How each parameter is cut over the ranks: its placement."""

from __future__ import annotations

import torch

from ..errors import BadInputError, TopologyError
from ..sharding.placement import Nested, PackedShard, Placement, Replicate, Shard, local_shape, shared
from ..sharding.topology import Topology
from ..strategies import TensorParallelLayer
from ..strategies.registry import ParallelInterface
from ..strategies.tracing import placement_on
from ..text import printable
from .model import Parameter

__all__ = ["copies_of", "does_cut", "placement_of"]


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
        copies = copies_of(parameter, topology.tp)
        placement = _cut(parameter, parameter.style, strategies, parameter.shape, topology.tp // copies)
        return shared(placement, topology.tp_row * copies)
    except ValueError as error:
        raise BadInputError(f"{printable(parameter.name)}: {parameter.style}: {error}") from None


def _cut(
    parameter: Parameter, style: str, strategies: ParallelInterface, shape: tuple[int, ...], ranks: int
) -> Placement:
    own_name = parameter.name.rpartition(".")[2]
    return placement_on(strategies.find(style), own_name, shape, getattr(torch, parameter.dtype), ranks)


def _expert_placement(
    parameter: Parameter, expert_style: str, strategies: ParallelInterface, topology: Topology
) -> Placement:
    """Cut by expert over the ep axis. If ranks share their experts, the tensor-parallel rule cuts these among them."""
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


def copies_of(parameter: Parameter, tp: int) -> int:
    """Return how many ranks in a row hold the same KV head: `tp` / heads if there are more ranks than heads, else 1."""
    heads = parameter.heads if parameter.shared else None
    return tp // heads if heads and tp > heads and tp % heads == 0 else 1

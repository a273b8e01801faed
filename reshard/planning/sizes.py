"""The numbers of ranks that a model allows, and the smallest whose parts fit a GPU."""

from __future__ import annotations

import math

from ..errors import TopologyError
from ..files.dtypes import itemsize
from ..sharding.placement import local_shape
from ..sharding.topology import Topology
from ..strategies.registry import ALL_PARALLEL_STYLES, ParallelInterface
from ..text import printable
from .cuts import placement_of
from .model import Model

__all__ = ["has_plan", "legal_sizes", "refusal_of", "smallest_fit"]


_LEAST_MEANT = 1 << 20  # bytes of a GPU; a smaller number lacks its unit


_LARGEST = 64  # ranks looked at when listing the legal sizes


def has_plan(model: Model) -> bool:
    """Whether any parameter has a style."""
    return any(parameter.style for parameter in model.parameters)


def refusal_of(model: Model, strategies: ParallelInterface, topology: Topology) -> str | None:
    """Say why the model cannot run on these ranks; None if it can."""
    if topology.tp > 1 and not has_plan(model):
        return "it has no tensor-parallel plan, so every rank would hold all of it"
    for parameter in model.parameters:
        heads, experts = parameter.heads, parameter.shape[0] if parameter.expert_style else topology.ep
        if heads and heads.query < topology.tp:
            return f"{printable(heads.attention)} has only {heads.query} query heads"
        if heads and heads.key_value < topology.tp and not heads.uneven and heads.key_value < heads.query:
            return f"{printable(heads.attention)} has only {heads.key_value} KV heads, which ranks cannot share"
        if experts < topology.ep:
            return f"{printable(parameter.name)} has only {experts} experts"
    return None


def legal_sizes(
    model: Model, *, strategies: ParallelInterface = ALL_PARALLEL_STYLES, most: int = _LARGEST
) -> dict[int, str | None]:
    """Say for each number of tensor-parallel ranks up to `most` why it does not fit; None if it does."""
    return {size: refusal_of(model, strategies, Topology(size)) for size in range(1, most + 1)}


def smallest_fit(model: Model, strategies: ParallelInterface, *, ep: int, memory: int) -> Topology:
    """Find the smallest TP size with `ep` that the model allows and that leaves no rank more than `memory` bytes of
    weights. Raises TopologyError if there is none."""
    least = None
    for tp in range(1, _LARGEST + 1):
        if tp % ep and ep % tp:
            continue
        topology = Topology(tp, ep)
        if refusal_of(model, strategies, topology) is None:
            least = _largest_part(model, strategies, topology)
            if least <= memory:
                return topology
    if least is None:
        raise TopologyError(f"no number of ranks with ep {ep} fits {model.architecture}")
    raise TopologyError(
        f"{model.architecture}: no number of ranks up to {_LARGEST} brings the weights of each under {memory:,} bytes;"
        f" the most have {least:,}",
        hint="reshard plan --tp-size N lists what is replicated"
        if memory >= _LEAST_MEANT
        else "24 GB are 24e9 bytes, or --gpu-memory 24GB",
    )


def _largest_part(model: Model, strategies: ParallelInterface, topology: Topology) -> int:
    """Return the bytes of rank 0's parameters: torch.chunk gives it the largest part of each."""
    first = {"rank": 0, "world_size": topology.world_size}
    return sum(
        math.prod(local_shape(placement_of(parameter, strategies, topology), parameter.shape, **first))
        * itemsize(parameter.dtype)
        for parameter in model.parameters
        if parameter.name not in model.tied
    )

"""The numbers of ranks that a model allows, and the smallest that fit GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import TopologyError
from ..sharding.topology import Topology
from ..strategies.registry import ALL_PARALLEL_STYLES, ParallelInterface
from ..text import printable
from .loads import Load, Serving, even_share, loads_of, replicated_share
from .model.model import Model

__all__ = ["Size", "legal_sizes", "refusal_of", "size_table", "smallest_fit"]

_LEAST_MEANT = 1 << 20  # bytes of a GPU; a smaller number lacks its unit
_LARGEST = 64  # ranks looked at when listing the legal sizes


def refusal_of(model: Model, strategies: ParallelInterface, topology: Topology) -> str | None:
    """Say why the model cannot run on these ranks; None if it can."""
    for parameter in model.parameters:
        heads, experts = parameter.heads, parameter.shape[0] if parameter.expert_style else topology.ep
        if heads and heads.query < topology.tp:
            return f"{printable(heads.attention)} has only {heads.query} query heads, or blocks of them, to deal out"
        if heads and heads.key_value < topology.tp and not heads.shareable and heads.key_value < heads.query:
            return f"{printable(heads.attention)} has only {heads.key_value} KV heads, which ranks cannot share"
        if experts < topology.ep:
            return f"{printable(parameter.name)} has only {experts} experts"
    return None


def legal_sizes(
    model: Model, *, strategies: ParallelInterface = ALL_PARALLEL_STYLES, most: int = _LARGEST
) -> dict[int, str | None]:
    """Say for each number of tensor-parallel ranks up to `most` why it does not fit; None if it does."""
    return {size: refusal_of(model, strategies, Topology(size)) for size in range(1, most + 1)}


@dataclass(frozen=True, slots=True)
class Size:
    """A legal number of ranks: the load of the fullest rank, that rank's weights in even shares, and the part of the
    model that every rank holds."""

    topology: Topology
    fullest: Load
    shares: float
    replicated: float

    def to_dict(self) -> dict[str, Any]:
        """Return what `reshard plan SOURCE --format json` prints of it."""
        return {
            "world_size": self.topology.world_size,
            "mesh": self.topology.to_json(),
            "even_shares": round(self.shares, 4),
            "replicated_share": round(self.replicated, 4),
            **self.fullest.to_dict(),
        }


def size_table(model: Model, strategies: ParallelInterface, *, ep: int, serving: Serving) -> tuple[Size, ...]:
    """Look at every legal number of ranks up to 64."""
    found = []
    for topology in _topologies(ep):
        if refusal_of(model, strategies, topology) is None:
            fullest = max(loads_of(model, strategies, topology, serving), key=lambda load: load.total)
            shares = fullest.weights / (even_share(model, topology.world_size) or 1)
            found.append(Size(topology, fullest, shares, replicated_share(model, strategies, topology)))
    return tuple(found)


def _topologies(ep: int) -> Iterator[Topology]:
    return (Topology(tp, ep) for tp in range(1, _LARGEST + 1) if tp % ep == 0 or ep % tp == 0)


def smallest_fit(model: Model, strategies: ParallelInterface, *, ep: int, memory: int, serving: Serving) -> Topology:
    """Find the smallest TP size with `ep` that the model allows and that leaves every rank room for its weights and its
    KV cache in `memory` bytes. Raises TopologyError if there is none."""
    room, least, serving = int(memory * serving.utilization), None, serving.of(model)
    for topology in _topologies(ep):
        if refusal_of(model, strategies, topology) is None:
            fullest = max(loads_of(model, strategies, topology, serving), key=lambda load: load.total)
            if fullest.total <= room:
                return topology
            least = min(least or fullest, fullest, key=lambda load: load.total)
    if least is None:
        raise TopologyError(f"no number of ranks with ep {ep} fits {model.architecture}")
    raise TopologyError(
        f"{model.architecture}: no number of ranks up to {_LARGEST} fits {memory:,} bytes each, of which"
        f" {serving.utilization:.0%} may be used; the least needs {least.weights:,} bytes of weights and"
        f" {least.cache or 0:,} of KV cache for {serving.batch_size} × {serving.max_model_len or 0} tokens",
        hint="reshard plan SOURCE lists every size; a smaller --max-model-len needs less"
        if memory >= _LEAST_MEANT
        else "24 GB are 24e9 bytes, or --gpu-memory 24GB",
    )

"""The load of each rank: bytes of weights, heads, and bytes of KV cache."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..files.dtypes import itemsize
from ..sharding.placement import Replicate, local_shape
from ..sharding.topology import Topology
from ..strategies.registry import ParallelInterface
from .cuts import placement_of
from .model.cache import cached_elements
from .model.model import Model, Parameter

__all__ = ["WEIGHTS_AND_CACHE", "Load", "Serving", "even_share", "loads_of", "repeated", "replicated_share"]


@dataclass(frozen=True, slots=True)
class Serving:
    """What a server keeps beside the weights: a KV cache for `batch_size` sequences of `max_model_len` tokens, in
    elements of dtype `kv_dtype` (a torch name). `utilization` is the part of a GPU's memory that all may take.

    None stands for the model's own longest sequence, and for the dtype that it computes with.
    """

    max_model_len: int | None = None
    batch_size: int = 1
    kv_dtype: str | None = None
    utilization: float = 0.9

    def of(self, model: Model) -> Serving:
        """Return the same with the model's values for None. The length stays None if the configuration lacks it."""
        return replace(
            self, max_model_len=self.max_model_len or model.max_length, kv_dtype=self.kv_dtype or model.dtype
        )


WEIGHTS_AND_CACHE = Serving()  # of one sequence, as long as the model allows


@dataclass(frozen=True, slots=True)
class Load:
    """What one rank holds.

    `weights` are bytes; the rank's `heads` are pairs of query and KV heads, one for each kind of attention that is cut.
    `per_token` are the bytes of KV cache for one more token, `cache` those of all tokens that are served; None if
    nothing tells.
    """

    weights: int
    heads: tuple[tuple[int, int], ...]
    per_token: int | None
    cache: int | None

    @property
    def total(self) -> int:
        return self.weights + (self.cache or 0)

    def to_dict(self) -> dict[str, Any]:
        """Return what the reports of a plan print: numbers, and lists of them."""
        return {
            "weight_bytes": self.weights,
            "heads": [{"query": query, "key_value": key_value} for query, key_value in self.heads],
            "kv_bytes_per_token": self.per_token,
            "kv_bytes": self.cache,
        }


def loads_of(model: Model, strategies: ParallelInterface, topology: Topology, serving: Serving) -> tuple[Load, ...]:
    """Return the load of every rank. Parameters have the dtype that the model computes with."""
    weights = _weights(model, strategies, topology)
    kinds = {(p.heads.query, p.heads.key_value): p.heads for p in reversed(model.parameters) if p.heads}
    dealt = [heads.dealt(topology.tp) for heads in reversed(kinds.values())]
    serving = serving.of(model)
    size, tokens, layers = itemsize(serving.kv_dtype or model.dtype), serving.max_model_len, model.cache
    one = None if layers is None else cached_elements(layers, topology)
    every = None if layers is None or tokens is None else cached_elements(layers, topology, tokens)
    return tuple(
        Load(
            weights[rank],
            tuple(
                (stop - start, sum(high - low for low, high in held))
                for (start, stop), held in (
                    (deal.query[rank // topology.tp_row], deal.key_value[rank // topology.tp_row]) for deal in dealt
                )
            ),
            None if one is None else one[rank] * size,
            None if every is None else every[rank] * size * serving.batch_size,
        )
        for rank in range(topology.world_size)
    )


def _weights(model: Model, strategies: ParallelInterface, topology: Topology) -> list[int]:
    """Return the bytes of each rank's parameters. Those of all layers that look alike are looked at once."""
    found = [0] * topology.world_size
    for parameter, count in _kinds(model).items():
        placement = placement_of(parameter, strategies, topology)
        for rank in range(topology.world_size):
            held = local_shape(placement, parameter.shape, rank=rank, world_size=topology.world_size)
            found[rank] += count * math.prod(held) * itemsize(parameter.dtype)
    return found


def replicated_share(model: Model, strategies: ParallelInterface, topology: Topology) -> float:
    """Return the part of the model's bytes that every rank holds."""
    sizes = {p: count * math.prod(p.shape) * itemsize(p.dtype) for p, count in _kinds(model).items()}
    whole = [size for p, size in sizes.items() if isinstance(placement_of(p, strategies, topology), Replicate)]
    return sum(whole) / (sum(sizes.values()) or 1)


def even_share(model: Model, ranks: int) -> float:
    """Return the bytes of weights that a rank would hold if all were cut evenly."""
    return sum(count * math.prod(p.shape) * itemsize(p.dtype) for p, count in _kinds(model).items()) / ranks


def repeated(loads: Sequence[Load], model: Model) -> list[str]:
    """Say of each kind of attention how often its KV heads are held, if more than once."""
    kinds = list(dict.fromkeys((p.heads.query, p.heads.key_value) for p in model.parameters if p.heads))
    held = [sum(load.heads[number][1] for load in loads) for number in range(len(kinds))]
    return [
        f"{query} query heads on {len(loads)} ranks: the {key_value} KV heads are held {times} times in all, and so is"
        " their KV cache"
        for (query, key_value), times in zip(kinds, held)
        if times > key_value
    ]


def _kinds(model: Model) -> Counter[Parameter]:
    """Count the parameters that are cut alike: the own name stays, since a style may look at it."""
    return Counter(
        replace(
            parameter,
            name=parameter.name.rpartition(".")[2],
            heads=parameter.heads and replace(parameter.heads, attention=""),
        )
        for parameter in model.parameters
        if parameter.name not in model.tied
    )

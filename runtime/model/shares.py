"""Work that the replicas of a model share: each takes its part, and the first rank gathers the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from ..distributed.replicas import Replicas
from .methods import given

__all__ = ["gather", "replicas_of", "share"]


T = TypeVar("T")


def replicas_of(model: Any) -> Replicas:
    """Those that a loaded model is one of."""
    found: Replicas = given(model, "_reshard_replicas")
    return found


def share(model: Any, items: Sequence[T]) -> list[T]:
    """Those of `items` that are this replica's work: each takes as many as the others, or one less. May be none."""
    replicas = replicas_of(model)
    return list(items[replicas.index :: replicas.count])


def gather(model: Any, found: Sequence[T]) -> list[T] | None:
    """What became of the items, in their order: `found` is this replica's share, one for each of its items.

    A collective: call it on every rank of every replica. The first rank gets them, the others None.
    """
    replicas = replicas_of(model)
    brought = (replicas.index, list(found)) if replicas.rank == 0 else None
    if replicas.count == 1:
        return list(found) if dist.get_rank(replicas.group) == 0 else None
    first = dist.get_rank(replicas.group) == 0
    everyone: list[Any] | None = [None] * dist.get_world_size(replicas.group) if first else None
    dist.gather_object(brought, everyone, dst=dist.get_global_rank(replicas.group, 0), group=replicas.group)
    if everyone is None:
        return None
    shares = dict(one for one in everyone if one is not None)
    joined: list[Any] = [None] * sum(map(len, shares.values()))
    for index, items in shares.items():
        joined[index :: replicas.count] = items
    return joined

"""Work shared among the replicas of a model: each takes a part, and the first rank gathers the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from ..distributed.replicas import Replicas
from .methods import given

__all__ = ["gather", "replicas_of", "share"]


T = TypeVar("T")


def replicas_of(model: Any) -> Replicas:
    """Return the replicas that a loaded model is one of. Raises UsageError if this runtime did not load the model."""
    found: Replicas = given(model, "_reshard_replicas")
    return found


def share(model: Any, items: Sequence[T]) -> list[T]:
    """Return this replica's part of `items`: as many as the others have, or one less. It may be empty."""
    replicas = replicas_of(model)
    return list(items[replicas.index :: replicas.count])


def gather(model: Any, found: Sequence[T]) -> list[T] | None:
    """Return the results of all items, in the items' order. `found` are this replica's, one for each of its items.

    A collective: call it on every rank of every replica. Only the first rank gets the results; the others get None.
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

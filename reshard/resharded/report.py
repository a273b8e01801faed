"""Parameters as the rows of a report: one row for those that look the same in all layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..sharding.placement import Explicit, Nested, Placement, Ranges, Replicate, Shard, local_shape
from ..text import printable

__all__ = ["placement_text", "replicated_bytes", "rows"]


def placement_text(placement: Placement) -> str:
    """Write a placement as torch would."""
    if isinstance(placement, Replicate):
        return "Replicate()"
    if isinstance(placement, Shard):
        return f"Shard({placement.dim})"
    if isinstance(placement, Explicit):
        return f"{sum(map(len, placement.boxes))} boxes"
    if isinstance(placement, Ranges):
        sizes = [sum(stop - start for start, stop in held) for held in placement.ranges]
        return f"Ranges({placement.dim}, {'|'.join(map(str, sizes))})"
    if isinstance(placement, Nested):
        outer = placement_text(placement.outer)
        if isinstance(placement.inner, Replicate):
            return f"{outer}, {placement.row} copies"
        return f"{outer}, {placement_text(placement.inner)}"
    blocks = placement.blocks
    packed = f"{len(blocks)}×{blocks[0]}" if len(set(blocks)) == 1 else "|".join(map(str, blocks))
    return f"PackedShard({placement.dim}, {packed})"


def rows(parameters: Iterable[Any], world_size: int) -> list[dict[str, Any]]:
    """Return one row for each kind of parameter: those that look the same in all layers share a row."""
    found: dict[tuple, dict[str, Any]] = {}
    for parameter in parameters:
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", parameter.name)
        placement = placement_text(parameter.placement)
        row = found.setdefault(
            (pattern, parameter.shape, parameter.dtype, parameter.style, placement),
            {
                "parameter": printable(pattern),
                "count": 0,
                "shape": list(parameter.shape),
                "dtype": parameter.dtype,
                "style": parameter.style,
                "placement": placement,
                "rank_0_shape": list(local_shape(parameter.placement, parameter.shape, rank=0, world_size=world_size)),
                "reason": parameter.reason,
            },
        )
        row["count"] += 1
    return list(found.values())


def replicated_bytes(parameters: Iterable[Any]) -> int:
    """Return the bytes that every rank file repeats: those of the replicated parameters."""
    return sum(parameter.nbytes for parameter in parameters if isinstance(parameter.placement, Replicate))

"""Parameters as the rows of a report: one row for those that look the same in all layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..sharding.placement import Explicit, Nested, Placement, Ranges, Replicate, Shard, local_shape
from ..text import printable
from ..transforms.bundle import Quantized
from .targets import Bundle, Target

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


def rows(parameters: Iterable[Target], bundles: Iterable[Bundle], world_size: int) -> list[dict[str, Any]]:
    """Return one row for each kind of parameter: those that look the same in all layers share a row. A quantized one
    has a row, and its tensors have none."""
    of = {name: bundle for bundle in bundles for name in bundle.quantized.members}
    nbytes: Counter[str] = Counter()
    shown: dict[str, Target] = {}
    for parameter in parameters:
        bundle = of.get(parameter.name)
        shown.setdefault(*((bundle.target.name, bundle.target) if bundle else (parameter.name, parameter)))
        nbytes[bundle.target.name if bundle else parameter.name] += parameter.nbytes
    quantized = {bundle.target.name: bundle.quantized for bundle in of.values()}
    found: dict[tuple, dict[str, Any]] = {}
    for parameter in shown.values():
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", parameter.name)
        placement = placement_text(parameter.placement)
        how = _quantized(parameter, quantized[parameter.name]) if parameter.name in quantized else None
        row = found.setdefault(
            (pattern, parameter.shape, parameter.dtype, parameter.style, placement, str(how)),
            {
                "parameter": printable(pattern),
                "count": 0,
                "shape": list(parameter.shape),
                "dtype": parameter.dtype,
                "style": parameter.style,
                "placement": placement,
                "rank_0_shape": list(local_shape(parameter.placement, parameter.shape, rank=0, world_size=world_size)),
                "reason": parameter.reason,
                **({"quantized": {**how, "bytes": nbytes[parameter.name]}} if how else {}),
            },
        )
        row["count"] += 1
    return list(found.values())


def _quantized(target: Target, quantized: Quantized) -> dict[str, Any]:
    """Return how a parameter is quantized: `unit` are the elements along each dim that no cut should divide."""
    return {
        "format": printable(quantized.format),
        "options": dict(quantized.options),
        "unit": [quantized.unit(dim) for dim in range(len(target.shape))],
    }


def replicated_bytes(parameters: Iterable[Target]) -> int:
    """Return the bytes that every rank file repeats: those of the replicated parameters."""
    return sum(parameter.nbytes for parameter in parameters if isinstance(parameter.placement, Replicate))

"""Parameters as the rows of a report: one row for those that look the same in all layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from operator import add
from typing import Any

from ..files.dtypes import itemsize
from ..sharding.placement import Explicit, Nested, Placement, Ranges, Replicate, Shard, local_shape, pieces
from ..text import printable
from ..transforms.bundle import Quantized
from .targets import Bundle, Target

__all__ = ["kind_of", "placement_text", "replicated_bytes", "rows"]


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


def rows(
    parameters: Iterable[Target], bundles: Iterable[Bundle], world_size: int, heads: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """Return one row for each kind of parameter: those that look the same in all layers share a row. A quantized one
    has a row, and its tensors have none.

    Of a row, `layers` are the runs (first, last) of the first number in the names, `bytes` are those of one parameter
    as the files store it, `rank_bytes` those of all of them on each rank. `cuts` have the ranges (start, stop) that
    each rank holds, for every dim that is cut: one twice, if a rank holds it twice. A parameter whose ranks hold no
    such product has `boxes` instead, one range for each dim. `heads` are the attention heads along the cut dim, of the
    parameters that are given with them.
    """
    of = {name: bundle for bundle in bundles for name in bundle.quantized.members}
    nbytes: Counter[str] = Counter()
    on_ranks: dict[str, list[int]] = {}
    shown: dict[str, Target] = {}
    local_bytes: dict[tuple, list[int]] = {}
    for parameter in parameters:
        bundle = of.get(parameter.name)
        target = bundle.target if bundle else parameter
        shown.setdefault(target.name, target)
        nbytes[target.name] += parameter.nbytes
        alike = (parameter.placement, parameter.shape, parameter.dtype)
        if alike not in local_bytes:
            local_bytes[alike] = _local_bytes(parameter, world_size)
        before = on_ranks.get(target.name)
        on_ranks[target.name] = list(map(add, before, local_bytes[alike])) if before else local_bytes[alike]
    quantized = {bundle.target.name: bundle.quantized for bundle in of.values()}
    found: dict[tuple, dict[str, Any]] = {}
    numbers: dict[tuple, set[int]] = {}
    for parameter in shown.values():
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", parameter.name)
        placement = placement_text(parameter.placement)
        how = _quantized(parameter, quantized[parameter.name]) if parameter.name in quantized else None
        key = (pattern, parameter.shape, parameter.dtype, parameter.style, placement, str(how))
        if key not in found:
            found[key] = {
                "parameter": printable(pattern),
                "count": 0,
                "layers": [],
                "kind": kind_of(pattern, parameter.style),
                "shape": list(parameter.shape),
                "dtype": parameter.dtype,
                "style": parameter.style,
                "placement": placement,
                "rank_0_shape": list(local_shape(parameter.placement, parameter.shape, rank=0, world_size=world_size)),
                "reason": parameter.reason,
                "bytes": nbytes[parameter.name],
                "rank_bytes": [0] * world_size,
                **_parts(parameter, world_size),
                **({"heads": heads[parameter.name]} if heads and parameter.name in heads else {}),
                **({"quantized": {**how, "bytes": nbytes[parameter.name]}} if how else {}),
            }
        row = found[key]
        row["count"] += 1
        row["rank_bytes"] = list(map(add, row["rank_bytes"], on_ranks[parameter.name]))
        if number := re.search(r"\.(\d{1,9})(?=\.|$)", parameter.name):
            numbers.setdefault(key, set()).add(int(number[1]))
    for key, several in numbers.items():
        found[key]["layers"] = _runs(several)
    return list(found.values())


def _runs(numbers: Iterable[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return runs


def _local_bytes(parameter: Target, world_size: int) -> list[int]:
    shapes = (
        local_shape(parameter.placement, parameter.shape, rank=r, world_size=world_size) for r in range(world_size)
    )
    return [prod(shape) * itemsize(parameter.dtype) for shape in shapes]


def _parts(parameter: Target, world_size: int) -> dict[str, Any]:
    """Return the `cuts` of a row, or its `boxes`."""
    shape, placement = parameter.shape, parameter.placement
    if isinstance(placement, Replicate):
        return {"cuts": []}
    held = [pieces(placement, shape, rank=rank, world_size=world_size) for rank in range(world_size)]
    boxes = [[[[at, at + e] for at, e in zip(piece.start, piece.extent)] for piece in of] for of in held]
    if isinstance(placement, Explicit):
        return {"boxes": boxes}
    dims = _cut_dims(placement)
    if len(dims) == 1:
        return {"cuts": [{"dim": dim, "ranges": [[box[dim] for box in of] for of in boxes]} for dim in dims]}
    # Along each of several dims, a range stands once, though boxes share it.
    apart = {dim: [[list(one) for one in dict.fromkeys((*box[dim],) for box in of)] for of in boxes] for dim in dims}
    return {"cuts": [{"dim": dim, "ranges": apart[dim]} for dim in sorted(dims)]}


def _cut_dims(placement: Placement) -> set[int]:
    """Return the dims that a placement cuts. A rank may hold all of one, if others hold nothing."""
    if isinstance(placement, Nested):
        return _cut_dims(placement.outer) | _cut_dims(placement.inner)
    return set() if isinstance(placement, (Replicate, Explicit)) else {placement.dim}


# What a parameter is part of, for people who look at a plan: the first line that has a part of its name, or a word of
# one. Names are all that families have in common here, so nothing but a picture may build upon it.
_KINDS: Sequence[tuple[str, frozenset[str]]] = (
    ("other", frozenset({"norm", "layernorm", "rmsnorm", "ln", "norm1", "norm2", "ln1", "ln2"})),
    ("mlp", frozenset({"shared_experts", "shared_expert"})),
    ("experts", frozenset({"experts"})),
    ("attention", frozenset({"attn", "attention", "attentions", "selfattention", "encdecattention", "crossattention"})),
    ("mlp", frozenset({"mlp", "ffn", "ff", "feed_forward", "intermediate", "fc1", "fc2", "w1", "w2", "w3"})),
    ("embedding", frozenset({"embed", "embeds", "embedding", "embeddings", "wte", "wpe", "lm_head", "embed_out"})),
)


def kind_of(name: str, style: str | None) -> str:
    """Return what a parameter of this name is part of: attention, mlp, experts, embedding (the head too) or other."""
    parts = name.lower().split(".")
    words = {word for part in parts for word in (part, *part.split("_"))}
    for kind, known in _KINDS:
        if not known.isdisjoint(words):
            return kind
    return "embedding" if (style or "").startswith("embedding") else "other"


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

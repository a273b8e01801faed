"""Placements as the manifest writes them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..files.untrusted import UnknownError, count, counts, one_of, text
from ..sharding.placement import Explicit, Nested, PackedShard, Piece, Placement, Replicate, Shard, pieces
from ..sharding.regions import Region, covers
from ..text import printable

__all__ = ["placement_from_json", "placement_to_json"]

# Each kind and its members. An unknown member could say where to cut, so none is ignored, in any version.
_KINDS = {
    "replicate": {"type"},
    "shard": {"type", "dim"},
    "packed": {"type", "dim", "blocks"},
    "nested": {"type", "outer", "inner", "row"},
    "explicit": {"type", "shapes", "boxes"},
}


def placement_to_json(placement: Placement) -> dict[str, Any]:
    """Return a placement as a JSON object."""
    if isinstance(placement, Replicate):
        return {"type": "replicate"}
    if isinstance(placement, Shard):
        return {"type": "shard", "dim": placement.dim}
    if isinstance(placement, PackedShard):
        return {"type": "packed", "dim": placement.dim, "blocks": list(placement.blocks)}
    if isinstance(placement, Nested):
        outer, inner = placement_to_json(placement.outer), placement_to_json(placement.inner)
        return {"type": "nested", "outer": outer, "inner": inner, "row": placement.row}
    return {
        "type": "explicit",
        "shapes": list(map(list, placement.shapes)),
        "boxes": [[[list(b.start), list(b.extent), list(b.local_start)] for b in boxes] for boxes in placement.boxes],
    }


def placement_from_json(content: dict[str, Any], shape: Sequence[int], world_size: int) -> Placement:
    """Return the placement of a tensor of `shape` on `world_size` ranks.

    Raises:
        UnknownError: this release does not know its kind, or a member of it.
        ValueError, TypeError, KeyError or IndexError: a tensor of this shape cannot have it.
    """
    kind = text(content["type"])
    if kind not in _KINDS:
        raise UnknownError(f"has a placement {printable(kind)}")
    if unknown := sorted(content.keys() - _KINDS[kind]):
        raise UnknownError(f"has a placement {kind} with {printable(unknown[0])}")
    if kind == "explicit":
        return _explicit(content, tuple(shape), world_size)
    if kind == "nested":
        row = count(content["row"])
        if row < 2 or world_size % row:
            raise ValueError(f"rows of {row} among {world_size} ranks")
        one_of(("shard", "packed"), content["outer"]["type"])
        one_of(("replicate", "shard", "packed"), content["inner"]["type"])
        outer = placement_from_json(content["outer"], shape, world_size // row)
        inner = placement_from_json(content["inner"], shape, row)
        nested = Nested(outer, inner, row)  # type: ignore[arg-type]
        for rank in range(world_size):  # the inner placement must fit what its row holds
            pieces(nested, shape, rank=rank, world_size=world_size)
        return nested
    if kind == "replicate":
        return Replicate()
    dim = range(len(shape))[count(content["dim"])]
    if kind == "shard":
        return Shard(dim)
    blocks = counts(content["blocks"])
    if sum(blocks) != shape[dim]:
        raise ValueError(f"blocks {blocks} in a shape of {shape}")
    return PackedShard(dim, blocks)


def _explicit(content: dict[str, Any], shape: tuple[int, ...], world_size: int) -> Explicit:
    shapes = tuple(map(counts, content["shapes"]))
    boxes = tuple(tuple(Piece(*map(counts, box)) for box in of_rank) for of_rank in content["boxes"])
    if not len(shapes) == len(boxes) == world_size:
        raise ValueError(f"boxes of {len(boxes)} ranks, not {world_size}")
    for local, of_rank in zip(shapes, boxes):
        for box in of_rank:
            for start, whole in ((box.start, shape), (box.local_start, local)):
                fits = len(start) == len(box.extent) == len(whole)
                if not fits or any(at + size > limit for at, size, limit in zip(start, box.extent, whole)):
                    raise ValueError(f"a box of {box.extent} at {start} in a shape of {whole}")
        if not covers([Region("", 0, box.extent, box.extent, box.local_start) for box in of_rank], local):
            raise ValueError(f"boxes that do not fill a tensor of {local}")
    return Explicit(shapes, boxes)

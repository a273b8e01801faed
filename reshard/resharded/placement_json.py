"""Placements as the manifest writes them. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..files.untrusted import UnknownError, count, counts, one_of, text
from ..sharding.dealing import scaled
from ..sharding.placement import Explicit, Nested, PackedShard, Piece, Placement, Ranges, Replicate, Shard, pieces
from ..sharding.regions import Region, covers
from ..text import printable

__all__ = ["Cuts", "placement_from_json", "placement_to_json"]

# Each kind and its members. An unknown member could say where to cut, so none is ignored, in any version.
_KINDS = {
    "replicate": {"type"},
    "shard": {"type", "dim"},
    "packed": {"type", "dim", "blocks"},
    "ranges": {"type", "dim", "cut", "unit"},
    "nested": {"type", "outer", "inner", "row"},
    "explicit": {"type", "shapes", "boxes"},
}


_Cut = tuple[tuple[tuple[int, int], ...], ...]  # for each rank, ranges of items


class Cuts:
    """The manifest's table of cuts: for each rank, the ranges of items that it holds.

    A placement refers to a cut, and says how many elements an item stands for. So a table of a few cuts serves all
    layers, and parameters that are cut together have one cut.
    """

    def __init__(self, cuts: Iterable[_Cut] = ()) -> None:
        self._cuts = list(cuts)  # as numbered by another writer, who may have one twice
        self._numbers = {cut: number for number, cut in enumerate(self._cuts)}
        self._placements: dict[tuple[int, ...], Ranges] = {}  # one object for all layers

    @classmethod
    def from_json(cls, content: Iterable[Mapping[str, Any]]) -> Cuts:
        """Read the table. Raises UnknownError, ValueError, TypeError or KeyError if it makes no sense."""
        found = []
        for item in content:
            if unknown := sorted(item.keys() - {"ranks"}):
                raise UnknownError(f"has a cut with {printable(unknown[0])}")
            found.append(tuple(tuple(map(_range, of_rank)) for of_rank in item["ranks"]))
        return cls(found)

    def __len__(self) -> int:
        return len(self._cuts)

    def to_json(self) -> list[dict[str, Any]]:
        return [{"ranks": [list(map(list, of_rank)) for of_rank in cut]} for cut in self._cuts]

    def refer(self, placement: Ranges) -> dict[str, Any]:
        """Return a placement as a JSON object, and add its cut to the table if it is new."""
        unit = math.gcd(*(bound for of_rank in placement.ranges for one in of_rank for bound in one)) or 1
        cut = tuple(tuple((start // unit, stop // unit) for start, stop in of_rank) for of_rank in placement.ranges)
        if cut not in self._numbers:
            self._numbers[cut] = len(self._cuts)
            self._cuts.append(cut)
        return {"type": "ranges", "dim": placement.dim, "cut": self._numbers[cut], "unit": unit}

    def find(self, dim: int, number: int, unit: int, size: int, world_size: int) -> Ranges:
        """Return the placement that refers to a cut.

        Raises ValueError or IndexError if a dim of `size` elements cannot have it.
        """
        key = (dim, number, unit, size, world_size)
        if key not in self._placements:
            placement = Ranges(dim, tuple(scaled(held, unit) for held in self._cuts[number]))
            if len(placement.ranges) != world_size:
                raise ValueError(f"cut {number} is for {len(placement.ranges)} ranks, not for {world_size}")
            reached = 0
            for start, stop in sorted(one for held in placement.ranges for one in held):
                if start > reached:
                    break
                reached = max(reached, stop)
            if reached != size:
                raise ValueError(f"cut {number} in units of {unit} does not fill a dim of {size}")
            self._placements[key] = placement
        return self._placements[key]


def _range(content: Any) -> tuple[int, int]:
    start, stop = counts(content)
    if start > stop:
        raise ValueError(f"a range from {start} to {stop}")
    return start, stop


def placement_to_json(placement: Placement, cuts: Cuts) -> dict[str, Any]:
    """Return a placement as a JSON object. It may refer to `cuts`, and add to them."""
    if isinstance(placement, Replicate):
        return {"type": "replicate"}
    if isinstance(placement, Shard):
        return {"type": "shard", "dim": placement.dim}
    if isinstance(placement, PackedShard):
        return {"type": "packed", "dim": placement.dim, "blocks": list(placement.blocks)}
    if isinstance(placement, Ranges):
        return cuts.refer(placement)
    if isinstance(placement, Nested):
        outer, inner = placement_to_json(placement.outer, cuts), placement_to_json(placement.inner, cuts)
        return {"type": "nested", "outer": outer, "inner": inner, "row": placement.row}
    return {
        "type": "explicit",
        "shapes": list(map(list, placement.shapes)),
        "boxes": [[[list(b.start), list(b.extent), list(b.local_start)] for b in boxes] for boxes in placement.boxes],
    }


def placement_from_json(content: dict[str, Any], shape: Sequence[int], world_size: int, cuts: Cuts) -> Placement:
    """Return the placement of a tensor of `shape` on `world_size` ranks. It may refer to `cuts`.

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
        one_of(("shard", "packed", "ranges"), content["outer"]["type"])
        one_of(("replicate", "shard", "packed", "ranges"), content["inner"]["type"])
        outer = placement_from_json(content["outer"], shape, world_size // row, cuts)
        inner = placement_from_json(content["inner"], shape, row, cuts)
        nested = Nested(outer, inner, row)  # type: ignore[arg-type]
        for rank in range(world_size):  # the inner placement must fit what its row holds
            pieces(nested, shape, rank=rank, world_size=world_size)
        return nested
    if kind == "replicate":
        return Replicate()
    dim = range(len(shape))[count(content["dim"])]
    if kind == "shard":
        return Shard(dim)
    if kind == "ranges":
        return cuts.find(dim, count(content["cut"]), count(content["unit"]), shape[dim], world_size)
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

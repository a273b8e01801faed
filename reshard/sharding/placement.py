"""Placements: the part of a tensor that each rank holds. Integers only: no torch, no files.

The words are torch's (`torch.distributed.tensor`): a placement says how one tensor lies on the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

__all__ = [
    "Explicit",
    "Nested",
    "PackedShard",
    "Piece",
    "Placement",
    "Ranges",
    "Replicate",
    "Shard",
    "block_sizes",
    "is_box",
    "local_shape",
    "offset",
    "pieces",
    "ranges_of",
    "shard_bounds",
    "shared",
]


def shard_bounds(size: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """Return the half-open range of `size` elements held by `rank`, as torch.chunk and DTensor's `Shard` cut.

    Chunks are ceil-sized; later ranks may hold less, or nothing.
    """
    chunk = -(-size // world_size)
    start = min(rank * chunk, size)
    return start, min(start + chunk, size)


def block_sizes(size: int, blocks: int | Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of the blocks packed along a dim of `size` elements.

    `blocks` is their number (equal blocks) or their relative sizes: `[4, 1, 1]` is q|k|v with 4 query heads a group.

    Raises:
        ValueError: `blocks` cannot fill `size` elements exactly.
    """
    weights = [1] * blocks if isinstance(blocks, int) else list(blocks)
    if not weights or min(weights) < 0 or sum(weights) == 0 or size % sum(weights):
        raise ValueError(f"{size} elements cannot be packed as {blocks} blocks")
    unit = size // sum(weights)
    return tuple(weight * unit for weight in weights)


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank holds the whole tensor."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Each rank holds one range of `dim` (non-negative), as torch.chunk cuts it."""

    dim: int


@dataclass(frozen=True, slots=True)
class PackedShard:
    """Blocks (gate|up, q|k|v) packed along `dim`; each rank holds its range of every block, in order.

    `blocks` are the block sizes in elements. Two equal blocks are DTensor's `_StridedShard(dim, split_factor=2)`.
    """

    dim: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ranges:
    """Each rank holds the ranges of `dim` that are listed for it, (start, stop) in elements, one after the other.

    This expresses parts that torch.chunk does not make: 8 heads on 3 ranks as 3, 3 and 2, or a KV head that ranks share
    unevenly. Ranks may hold the same elements, and a rank may hold a range twice.
    """

    dim: int
    ranges: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True, slots=True)
class Nested:
    """Two axes of a mesh, whose ranks stand in rows of `row` ranks: `outer` cuts over the rows, and `inner` cuts the
    part of each row over the row's ranks.

    Fewer KV heads than ranks: `Nested(Shard(0), Replicate(), row)`. Experts that are cut themselves: `Nested(Shard(0),
    PackedShard(1, …), row)`.
    """

    outer: Shard | PackedShard | Ranges
    inner: Replicate | Shard | PackedShard | Ranges
    row: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the global tensor, `start` and `extent`, that stands at `local_start` in the rank's tensor."""

    start: tuple[int, ...]
    extent: tuple[int, ...]
    local_start: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Explicit:
    """Boxes listed rank by rank, as a custom strategy chose them: `shapes` of the ranks' tensors, and their `boxes`."""

    shapes: tuple[tuple[int, ...], ...]
    boxes: tuple[tuple[Piece, ...], ...]


Placement: TypeAlias = Replicate | Shard | PackedShard | Ranges | Nested | Explicit


def shared(placement: Placement, copies: int) -> Placement:
    """Return the same cut over fewer ranks: `copies` ranks in a row hold each part.

    Raises:
        ValueError: `placement` is listed rank by rank, or is cut by two axes already.
    """
    if copies == 1 or isinstance(placement, Replicate):
        return placement
    if isinstance(placement, (Shard, PackedShard)):
        return Nested(placement, Replicate(), copies)
    if isinstance(placement, Ranges):
        return Ranges(placement.dim, tuple(held for held in placement.ranges for _ in range(copies)))
    if isinstance(placement, Nested) and isinstance(placement.inner, Replicate):
        return Nested(placement.outer, Replicate(), placement.row * copies)
    raise ValueError("it is cut over all ranks, so it cannot be shared by some")


def ranges_of(
    placement: Shard | PackedShard | Ranges, size: int, *, rank: int, world_size: int
) -> Iterator[tuple[int, int]]:
    """Yield the ranges of the sharded dim, of `size` elements, that `rank` holds, in local order."""
    if isinstance(placement, Ranges):
        if len(placement.ranges) != world_size:
            raise ValueError(f"ranges for {len(placement.ranges)} ranks, not for {world_size}")
        yield from placement.ranges[rank]
        return
    blocks = (size,) if isinstance(placement, Shard) else placement.blocks
    if sum(blocks) != size:
        raise ValueError(f"blocks {blocks} do not fill a dim of {size}")
    base = 0
    for block in blocks:
        start, stop = shard_bounds(block, rank=rank, world_size=world_size)
        yield base + start, base + stop
        base += block


def pieces(placement: Placement, shape: Sequence[int], *, rank: int, world_size: int) -> tuple[Piece, ...]:
    """Return the boxes of a tensor of `shape` that `rank` holds: one of a plain shard, else one of each block or range.

    Empty boxes are left out, so an empty rank has none.
    """
    shape = tuple(shape)
    zeros = (0,) * len(shape)
    if isinstance(placement, Explicit):
        return placement.boxes[rank]
    if isinstance(placement, Replicate):
        return (Piece(zeros, shape, zeros),) if 0 not in shape else ()
    if isinstance(placement, Nested):
        return _nested_pieces(placement, shape, rank, world_size)
    dim = placement.dim
    found, local = [], 0
    for start, stop in ranges_of(placement, shape[dim], rank=rank, world_size=world_size):
        extent = (*shape[:dim], stop - start, *shape[dim + 1 :])
        if 0 not in extent:
            found.append(
                Piece((*zeros[:dim], start, *zeros[dim + 1 :]), extent, (*zeros[:dim], local, *zeros[dim + 1 :]))
            )
        local += stop - start
    return tuple(found)


def _nested_pieces(placement: Nested, shape: tuple[int, ...], rank: int, world_size: int) -> tuple[Piece, ...]:
    """Intersect the outer boxes of the rank's row with the inner boxes of the row's part."""
    rows = world_size // placement.row
    outer = pieces(placement.outer, shape, rank=rank // placement.row, world_size=rows)
    held = local_shape(placement.outer, shape, rank=rank // placement.row, world_size=rows)
    found = []
    for box in pieces(placement.inner, held, rank=rank % placement.row, world_size=placement.row):
        for part in outer:
            start = tuple(map(max, box.start, part.local_start))
            stop = tuple(min(a + b, c + d) for a, b, c, d in zip(box.start, box.extent, part.local_start, part.extent))
            if all(low < high for low, high in zip(start, stop)):
                found.append(
                    Piece(
                        tuple(at - local + origin for at, local, origin in zip(start, part.local_start, part.start)),
                        tuple(high - low for low, high in zip(start, stop)),
                        tuple(at - origin + local for at, origin, local in zip(start, box.start, box.local_start)),
                    )
                )
    return tuple(found)


def local_shape(placement: Placement, shape: Sequence[int], *, rank: int, world_size: int) -> tuple[int, ...]:
    """Return the shape of the rank's tensor."""
    if isinstance(placement, Replicate):
        return tuple(shape)
    if isinstance(placement, Explicit):
        return placement.shapes[rank]
    if isinstance(placement, Nested):
        row, place = divmod(rank, placement.row)
        held = local_shape(placement.outer, shape, rank=row, world_size=world_size // placement.row)
        return local_shape(placement.inner, held, rank=place, world_size=placement.row)
    dim = placement.dim
    length = sum(stop - start for start, stop in ranges_of(placement, shape[dim], rank=rank, world_size=world_size))
    return (*shape[:dim], length, *shape[dim + 1 :])


def offset(placement: Placement, shape: Sequence[int], *, rank: int, world_size: int) -> tuple[int, ...]:
    """Return where the rank's tensor begins in the whole one; the end of the dim if a `Shard` leaves it nothing."""
    found = pieces(placement, shape, rank=rank, world_size=world_size)
    if found:
        return found[0].start
    if isinstance(placement, Nested):
        return offset(placement.outer, shape, rank=rank // placement.row, world_size=world_size // placement.row)
    start = [0] * len(shape)
    if isinstance(placement, Shard):
        start[placement.dim] = shard_bounds(shape[placement.dim], rank=rank, world_size=world_size)[0]
    return tuple(start)


def is_box(placement: Placement) -> bool:
    """Whether every rank holds one box of the whole tensor, and the boxes fit together as torch cuts them."""
    if isinstance(placement, Nested):
        return is_box(placement.outer) and is_box(placement.inner)
    return isinstance(placement, (Replicate, Shard))

"""Which part of a tensor each rank holds. Integers only: no torch, no files.

The words are torch's (`torch.distributed.tensor`): a placement says how one tensor lies on the one-dimensional mesh.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

__all__ = [
    "PackedShard",
    "Piece",
    "Placement",
    "Replicate",
    "Shard",
    "block_sizes",
    "local_shape",
    "pieces",
    "shard_bounds",
]


def shard_bounds(size: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """Half-open range of `size` elements held by `rank`: the convention of torch.chunk and DTensor's `Shard`.

    Chunks are ceil-sized; later ranks may hold less, or nothing.
    """
    chunk = -(-size // world_size)
    start = min(rank * chunk, size)
    return start, min(start + chunk, size)


def block_sizes(size: int, blocks: int | Sequence[int]) -> tuple[int, ...]:
    """Sizes of the blocks packed along a dim of `size` elements.

    `blocks` is their number (equal blocks) or their relative sizes: `[4, 1, 1]` is q|k|v with 4 query heads a group.

    Raises:
        ValueError: `size` is not made of such blocks.
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
    """Each rank holds one range of `dim` (non-negative), as torch.chunk cuts it.

    With `copies`, that many ranks in a row hold the same range: KV heads of a model with fewer of them than ranks.
    """

    dim: int
    copies: int = 1

    def bounds(self, size: int, *, rank: int, world_size: int) -> tuple[int, int]:
        """The range of a dim of `size` that `rank` holds."""
        return shard_bounds(size, rank=rank // self.copies, world_size=world_size // self.copies)


@dataclass(frozen=True, slots=True)
class PackedShard:
    """Blocks (gate|up, q|k|v) packed along `dim`; each rank holds its range of every block, in order.

    `blocks` are the block sizes in elements. Two equal blocks are DTensor's `_StridedShard(dim, split_factor=2)`.
    """

    dim: int
    blocks: tuple[int, ...]


Placement: TypeAlias = Replicate | Shard | PackedShard


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the global tensor, `start` and `extent`, that stands at `local_start` in the rank's tensor."""

    start: tuple[int, ...]
    extent: tuple[int, ...]
    local_start: tuple[int, ...]


def _ranges(placement: Shard | PackedShard, size: int, rank: int, world_size: int) -> Iterator[tuple[int, int]]:
    """The ranges of the sharded dim that `rank` holds, in local order."""
    if isinstance(placement, Shard):
        yield placement.bounds(size, rank=rank, world_size=world_size)
        return
    if sum(placement.blocks) != size:
        raise ValueError(f"blocks {placement.blocks} do not fill a dim of {size}")
    base = 0
    for block in placement.blocks:
        start, stop = shard_bounds(block, rank=rank, world_size=world_size)
        yield base + start, base + stop
        base += block


def pieces(placement: Placement, shape: Sequence[int], *, rank: int, world_size: int) -> tuple[Piece, ...]:
    """The boxes of a tensor of `shape` that `rank` holds: one for a plain shard, one a block where it is packed.

    Boxes that hold nothing are left out, so an empty rank has none.
    """
    shape = tuple(shape)
    zeros = (0,) * len(shape)
    if isinstance(placement, Replicate):
        return (Piece(zeros, shape, zeros),) if 0 not in shape else ()
    dim = placement.dim
    found, local = [], 0
    for start, stop in _ranges(placement, shape[dim], rank, world_size):
        extent = (*shape[:dim], stop - start, *shape[dim + 1 :])
        if 0 not in extent:
            found.append(
                Piece((*zeros[:dim], start, *zeros[dim + 1 :]), extent, (*zeros[:dim], local, *zeros[dim + 1 :]))
            )
        local += stop - start
    return tuple(found)


def local_shape(placement: Placement, shape: Sequence[int], *, rank: int, world_size: int) -> tuple[int, ...]:
    """Shape of the rank's tensor."""
    if isinstance(placement, Replicate):
        return tuple(shape)
    dim = placement.dim
    length = sum(stop - start for start, stop in _ranges(placement, shape[dim], rank, world_size))
    return (*shape[:dim], length, *shape[dim + 1 :])

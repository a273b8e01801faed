"""Bundles: the tensors of one quantized parameter, and how each follows the parameter's cut. Integers only, no torch.

A cut of the parameter is exact for any bounds. A rank gets every entry of a member that meets its part: a word of
packed values, or the scale of a block, that a bound goes through is on both ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..sharding.dealing import placement_of_ranges
from ..sharding.placement import (
    Nested,
    PackedShard,
    Piece,
    Placement,
    Ranges,
    Replicate,
    Shard,
    pieces,
    ranges_of,
    shared,
)

__all__ = [
    "ONE",
    "Follows",
    "Member",
    "Quantized",
    "Role",
    "block_at",
    "boxes_of",
    "count",
    "divides_entries",
    "matrices",
    "matrix_at",
    "member_box",
    "member_of",
    "member_placement",
    "member_shape",
]

_MOST = 1 << 40
ONE = 0  # the unit of an entry that stands for all elements along a dim of its matrix


@dataclass(frozen=True, slots=True)
class Follows:
    """A dim of a member follows the dim `dim` of the parameter: `width` entries stand for `unit` elements there."""

    dim: int
    unit: int = 1
    width: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no tensor can have: they may come from a file."""
        for number, least in ((self.dim, 0), (self.unit, ONE), (self.width, 1)):
            if type(number) is not int or not least <= number <= _MOST:
                raise ValueError(f"{number!r:.50} is no number of elements")


@dataclass(frozen=True, slots=True)
class Role:
    """A tensor that a format stores for a matrix: its name ends with `suffix`, its dtype is one of `dtypes` (torch's
    names).

    `dims` says what each of its dims follows in the matrix, [out, in]; None if the matrix needs all of it for any part.
    `shape` is the one that it is stored in, if its dims do not give it. `needed` is false for one that may be missing.
    """

    suffix: str
    dtypes: tuple[str, ...]
    dims: tuple[Follows, ...] | None
    shape: tuple[int, ...] | None = None
    needed: bool = True


@dataclass(frozen=True, slots=True)
class Member:
    """A tensor of a bundle. `role` is the suffix by which its format knows it; `dims` say what its dims follow in the
    parameter.

    If the matrices of a parameter have texts of different lengths, the tensor is one run of them, on every rank whole:
    `dims` is empty, and `lengths` has the entries of each, in the order of `matrix_at`.
    """

    role: str
    dims: tuple[Follows, ...]
    lengths: tuple[int, ...] = ()


def member_of(role: Role, outer: int) -> Member:
    """Return the tensor of a role as a member of a parameter that has `outer` dims, of experts, before the matrix's."""
    inner = (Follows(at.dim + outer, at.unit, at.width) for at in role.dims or ())
    return Member(role.suffix, (*(Follows(dim) for dim in range(outer)), *inner))


@dataclass(frozen=True, slots=True)
class Quantized:
    """How a parameter is quantized: the format and its options, both as the manifest has them.

    `members` are its tensors, by name. `blocks` are the sizes, along each dim of the parameter, of the matrices that
    stand side by side in it, as gate and up do: each has entries of its own.
    """

    format: str
    options: Mapping[str, Any]
    members: Mapping[str, Member]
    blocks: tuple[tuple[int, ...], ...]

    def unit(self, dim: int) -> int:
        """Return the number of elements along `dim` that share entries: no entry is on two ranks if they stay
        together."""
        units = (at.unit for member in self.members.values() for at in member.dims if at.dim == dim)
        return math.lcm(*(unit for unit in units if unit != ONE))


def count(at: Follows, size: int) -> int:
    """Return the number of entries for `size` elements of one matrix."""
    return at.width * (1 if at.unit == ONE else -(-size // at.unit))


def block_at(start: int, blocks: Sequence[int]) -> tuple[int, int]:
    """Return the number of the block that holds the element `start`, and its first element."""
    first = 0
    for number, block in enumerate(blocks):
        if start < first + block:
            return number, first
        first += block
    raise ValueError(f"element {start} of {first}")


def entries(start: int, stop: int, at: Follows, blocks: Sequence[int]) -> tuple[int, int]:
    """Return the range of entries that meet the elements from `start` to `stop`: one at least, all in one block."""
    number, first = block_at(start, blocks)
    base = sum(count(at, block) for block in blocks[:number])
    if at.unit == ONE:
        return base, base + at.width
    begin, end = (start - first) // at.unit, -(-(stop - first) // at.unit)
    return base + begin * at.width, base + end * at.width


def matrices(blocks: Sequence[Sequence[int]]) -> int:
    """Return the number of matrices in a parameter whose dims have `blocks`."""
    outer = len(blocks) - 2
    return math.prod(map(sum, blocks[:outer])) * math.prod(map(len, blocks[outer:]))


def matrix_at(place: Sequence[int], blocks: Sequence[Sequence[int]]) -> int:
    """Return the number of the matrix that holds the element at `place`. The last dim's blocks are counted first."""
    number, outer = 0, len(blocks) - 2
    for dim, (at, along) in enumerate(zip(place, blocks)):
        number = number * sum(along) + at if dim < outer else number * len(along) + block_at(at, along)[0]
    return number


def in_blocks(start: int, stop: int, blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Split a range of elements at the bounds of blocks."""
    first = 0
    for block in blocks:
        low, high = max(start, first), min(stop, first + block)
        if low < high:
            yield low, high
        first += block


def divides_entries(q: Quantized, placement: Placement, world_size: int) -> bool:
    """Whether a bound of a rank's part of a parameter goes through elements that share an entry."""
    shape = tuple(sum(along) for along in q.blocks)
    for rank in range(world_size):
        for piece in pieces(placement, shape, rank=rank, world_size=world_size):
            for dim, (start, extent) in enumerate(zip(piece.start, piece.extent)):
                unit, along = q.unit(dim), q.blocks[dim]
                for low, high in in_blocks(start, start + extent, along) if unit > 1 else ():
                    number, first = block_at(low, along)
                    if (low - first) % unit or ((high - first) % unit and high != first + along[number]):
                        return True
    return False


def member_placement(
    member: Member, blocks: Sequence[Sequence[int]], placement: Placement, shape: Sequence[int], world_size: int
) -> Placement:
    """Return the placement of a bundle's tensor, from the `placement` of its parameter of `shape`.

    A tensor that follows no cut dim is replicated, and so is one of a parameter that a custom style cut into boxes.
    """
    if isinstance(placement, Nested):
        rows = world_size // placement.row
        outer = member_placement(member, blocks, placement.outer, shape, rows)
        inner = member_placement(member, blocks, placement.inner, shape, placement.row)
        if isinstance(outer, Replicate):
            return _tiled(inner, member_shape(member, blocks), placement.row, rows)
        if isinstance(inner, Replicate):
            return shared(outer, placement.row)
        return Nested(outer, inner, placement.row)  # type: ignore[arg-type]
    if not isinstance(placement, (Shard, PackedShard, Ranges)):
        return Replicate()
    number = next((number for number, at in enumerate(member.dims) if at.dim == placement.dim), None)
    if number is None:
        return Replicate()
    at, along = member.dims[number], blocks[placement.dim]
    size = sum(count(at, block) for block in along)
    held = []
    for rank in range(world_size):
        ranges: list[tuple[int, int]] = []
        for start, stop in ranges_of(placement, shape[placement.dim], rank=rank, world_size=world_size):
            for low, high in in_blocks(start, stop, along):
                first, last = entries(low, high, at, along)
                if ranges and ranges[-1][1] == first:
                    first = ranges.pop()[0]
                ranges.append((first, last))
        held.append(tuple(ranges) or ((size, size),))
    if all(of_rank == ((0, size),) for of_rank in held):
        return Replicate()
    return placement_of_ranges(number, size, held)


def _tiled(placement: Placement, shape: Sequence[int], row: int, rows: int) -> Placement:
    """Return the placement with which each of `rows` rows of ranks holds what `placement` gives to one row."""
    if isinstance(placement, Replicate) or rows == 1:
        return placement
    assert isinstance(placement, (Shard, PackedShard, Ranges))
    held = [tuple(ranges_of(placement, shape[placement.dim], rank=rank, world_size=row)) for rank in range(row)]
    return placement_of_ranges(placement.dim, shape[placement.dim], held * rows)


def member_shape(member: Member, blocks: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the shape of a tensor that follows a parameter whose dims have `blocks`."""
    if member.lengths:
        return (sum(member.lengths),)
    return tuple(sum(count(at, block) for block in blocks[at.dim]) for at in member.dims)


def boxes_of(placement: Placement, q: Quantized, *, rank: int, world_size: int, most: int) -> Iterator[Piece]:
    """Yield the boxes of the parameter that `rank` holds, split at the bounds of blocks and of about `most` elements
    each, so that every box is in one matrix."""
    shape = tuple(sum(along) for along in q.blocks)
    for piece in pieces(placement, shape, rank=rank, world_size=world_size):
        steps = (*(1 for _ in shape[:-2]), max(1, most // piece.extent[-1]), piece.extent[-1])
        along = []
        for dim, (start, extent, step) in enumerate(zip(piece.start, piece.extent, steps)):
            parts = in_blocks(start, start + extent, q.blocks[dim])
            along.append([(at, min(at + step, high)) for low, high in parts for at in range(low, high, step)])
        for box in itertools.product(*along):
            low = tuple(start for start, _ in box)
            yield Piece(
                low,
                tuple(stop - start for start, stop in box),
                tuple(at - start + local for at, start, local in zip(low, piece.start, piece.local_start)),
            )


def member_box(member: Member, box: Piece, blocks: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Return the range of entries, along each dim of a bundle's tensor, that meet a box of the parameter."""
    if member.lengths:
        number = matrix_at(box.start, blocks)
        first = sum(member.lengths[:number])
        return ((first, first + member.lengths[number]),)
    return tuple(
        entries(box.start[at.dim], box.start[at.dim] + box.extent[at.dim], at, blocks[at.dim]) for at in member.dims
    )

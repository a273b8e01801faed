"""Regions: which elements of which source tensor stand where in a target tensor. Integers only.

Regions describe everything this tool moves. A plain shard is one region, a packed shard several; fused experts have one
per expert and projection; a transposed or interleaved weight is one with other strides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .placement import Piece

__all__ = [
    "Box",
    "Region",
    "boxes",
    "contiguous_strides",
    "covers",
    "cut",
    "is_run",
    "run_length",
    "run_starts",
    "whole",
]


@dataclass(frozen=True, slots=True)
class Region:
    """A strided view of a source tensor's elements, and the box it fills in the target tensor.

    `strides`, `extent` and `target_start` have one entry for each dim of the *target*. Element `i` of the box (counted
    from its start) is the source's flat element `offset + sum(i * strides)`, so the source may have other dims.
    """

    source: str
    offset: int
    strides: tuple[int, ...]
    extent: tuple[int, ...]
    target_start: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.extent)


@dataclass(frozen=True, slots=True)
class Box:
    """One contiguous run of a C-ordered tensor: `start` and `extent` per dim, `offset` in elements."""

    start: tuple[int, ...]
    extent: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.extent)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, of a C-ordered tensor of `shape`."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def whole(source: str, shape: Sequence[int]) -> tuple[Region, ...]:
    """Return the region of a source tensor taken as it is; none if it has no elements."""
    if 0 in shape:
        return ()
    return (Region(source, 0, contiguous_strides(shape), tuple(shape), (0,) * len(shape)),)


def cut(regions: Iterable[Region], piece: Piece) -> tuple[Region, ...]:
    """Cut `regions` to the box `piece.start`, `piece.extent`, and move the parts to stand at `piece.local_start`."""
    found = []
    # Plain loops: a mixture of experts has 100,000 regions, each cut for every rank.
    bounds = [(low, low + size, local - low) for low, size, local in zip(piece.start, piece.extent, piece.local_start)]
    for region in regions:
        offset, extent, start = region.offset, [], []
        for at, size, stride, (low, high, shift) in zip(region.target_start, region.extent, region.strides, bounds):
            begin, end = (low if low > at else at), (high if high < at + size else at + size)
            if begin >= end:
                break
            offset += (begin - at) * stride
            extent.append(end - begin)
            start.append(begin + shift)
        else:
            found.append(Region(region.source, offset, region.strides, tuple(extent), tuple(start)))
    return tuple(found)


def covers(regions: Sequence[Region], shape: Sequence[int]) -> bool:
    """Whether the boxes of `regions` tile a tensor of `shape`: inside it, without overlap, nothing left out."""
    if sum(region.size for region in regions) != math.prod(shape):
        return False
    for region in regions:
        if any(s < 0 or s + e > size for s, e, size in zip(region.target_start, region.extent, shape)):
            return False
    return not _overlap(regions)


def _overlap(regions: Sequence[Region]) -> bool:
    """Whether two boxes overlap. Sweeps over the dim with the most distinct starts, to compare only neighbours."""
    if len(regions) < 2:
        return False
    dim = max(range(len(regions[0].extent)), key=lambda d: len({region.target_start[d] for region in regions}))
    ordered = sorted(regions, key=lambda region: region.target_start[dim])
    for i, one in enumerate(ordered):
        for other in itertools.islice(ordered, i + 1, None):
            if other.target_start[dim] >= one.target_start[dim] + one.extent[dim]:
                break
            if all(
                a < b + f and b < a + e
                for a, e, b, f in zip(one.target_start, one.extent, other.target_start, other.extent)
            ):
                return True
    return False


def boxes(shape: Sequence[int], limit: int) -> Iterator[Box]:
    """Tile a tensor with contiguous runs of at most `limit` elements (at least one), in memory order."""
    shape = tuple(shape)
    if 0 in shape:
        return
    if not shape:
        yield Box((), (), 0)
        return
    strides = contiguous_strides(shape)
    # The outermost dim whose single rows fit: dims inside it are taken whole, dims outside it one index at a time.
    dim = next((d for d, row in enumerate(strides) if row <= limit), len(shape) - 1)
    rows = max(1, limit // strides[dim])
    outer = itertools.product(*(range(size) for size in shape[:dim]))
    for index in outer:
        base = sum(i * s for i, s in zip(index, strides))
        for row in range(0, shape[dim], rows):
            extent = min(rows, shape[dim] - row)
            yield Box(
                (*index, row, *(0 for _ in shape[dim + 1 :])),
                (*(1 for _ in index), extent, *shape[dim + 1 :]),
                base + row * strides[dim],
            )


def is_run(region: Region) -> bool:
    """Whether the region's elements lie contiguously, in order, in the source file."""
    step = 1
    for size, stride in zip(reversed(region.extent), reversed(region.strides)):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def run_length(region: Region, shape: Sequence[int]) -> int:
    """Return the number of elements of a run. A run is a stretch of the region that lies contiguously both in its
    source and in a C-ordered target of `shape`; all runs of a region are as long."""
    length = 1
    for size, stride, step in reversed(list(zip(region.extent, region.strides, contiguous_strides(shape)))):
        if size != 1 and not stride == step == length:
            break
        length *= size
    return length


def run_starts(region: Region, shape: Sequence[int], *, width: int = 1) -> tuple[list[int], list[int]]:
    """Return where the runs of a region start, in its source and in a C-ordered target of `shape`: in elements, or in
    bytes if an element has `width` of them."""
    steps = contiguous_strides(shape)
    source, target = [region.offset * width], [sum(at * step for at, step in zip(region.target_start, steps)) * width]
    left = region.size // run_length(region, shape)  # the outer dims; those inside are within a run
    for size, stride, step in zip(region.extent, region.strides, steps):
        if left == 1:
            break
        left //= size
        source = [start + index * stride * width for start in source for index in range(size)]
        target = [start + index * step * width for start in target for index in range(size)]
    return source, target

"""Regions inverted: from the tensors of the rank files back to the source tensor they were cut from, and on from there
to another cut of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from .placement import Piece
from .regions import Region, contiguous_strides, covers, cut

__all__ = ["invert", "once", "refined_shape", "through"]


def refined_shape(shape: tuple[int, ...], regions: Iterable[Region]) -> tuple[int, ...]:
    """Return a shape of the same elements in the same order, with dims fine enough to express the regions' boxes.

    A conversion may have seen [64, …] as [2, 32, …]. Then the source gets that shape, if its dims divide so.
    """
    size = math.prod(shape)
    steps = set(contiguous_strides(shape)) if size else set()
    finer = {stride for region in regions for extent, stride in zip(region.extent, region.strides) if extent > 1}
    refined, outer = [], size
    for step in sorted((steps | finer) - {0, size}, reverse=True):
        if outer % step == 0 and all(step % other == 0 or other % step == 0 for other in steps - {0}):
            refined.append(outer // step)
            outer = step
    return (*refined, outer) if outer > 1 or not refined else tuple(refined)


@dataclass(frozen=True, slots=True)
class _Box:
    """A box of the source and of the rank's tensor: `axes` are (extent, stride in the source, stride in the latter)."""

    axes: tuple[tuple[int, int, int], ...]
    source_at: int
    local_at: int

    def split(self, axis: int, at: int) -> tuple[_Box, _Box]:
        extent, source, local = self.axes[axis]
        before, after = self.axes[:axis], self.axes[axis + 1 :]
        return (
            replace(self, axes=(*before, (at, source, local), *after)),
            _Box(
                (*before, (extent - at, source, local), *after),
                self.source_at + at * source,
                self.local_at + at * local,
            ),
        )


def invert(region: Region, held: str, local_shape: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[Region]:
    """Yield the regions that fill the source tensor, of `shape` (a refined one), from the tensor `held` of
    `local_shape`, a box of which `region` fills. If `shape` lacks a dim of the box, each index there has a region."""
    strides = contiguous_strides(local_shape)
    axes = tuple(
        axis for axis in zip(region.extent, region.strides, strides) if axis[0] > 1 and axis[1]
    )  # an element that was repeated is taken once
    local_at = sum(start * stride for start, stride in zip(region.target_start, strides))
    yield from _placed(_Box(axes, region.offset, local_at), held, shape)


def through(
    region: Region, local_shape: tuple[int, ...], parts: Sequence[Region], shape: tuple[int, ...]
) -> Iterator[Region]:
    """Yield the regions that fill the box of `region` in a tensor of `local_shape`, not from the source but from the
    tensors that hold it now: `parts` fill the source, of `shape` (a refined one, fine enough for the region too)."""
    for one in _unrepeated(region):
        for wanted in invert(one, region.source, local_shape, shape):
            seen = Piece(wanted.target_start, wanted.extent, (0,) * len(shape))
            for part in cut(parts, seen):  # its box now starts where it stands inside `wanted`
                local_at = wanted.offset + sum(map(math.prod, zip(part.target_start, wanted.strides)))
                axes = tuple(axis for axis in zip(part.extent, wanted.strides, part.strides) if axis[0] > 1)
                yield from _placed(_Box(axes, local_at, part.offset), part.source, local_shape)


def _unrepeated(region: Region) -> Iterator[Region]:
    """Yield a region for each time that `region` repeats its elements."""
    repeated = [range(e if s == 0 else 1) for e, s in zip(region.extent, region.strides)]
    extent = tuple(1 if s == 0 else e for e, s in zip(region.extent, region.strides))
    for index in itertools.product(*repeated):
        start = tuple(map(sum, zip(region.target_start, index)))
        yield replace(region, extent=extent, target_start=start)


def once(regions: Iterable[Region], shape: tuple[int, ...]) -> tuple[Region, ...]:
    """Return the regions of a tensor of `shape` without the elements that an earlier region fills: the first copy is
    taken."""
    boxes: dict[tuple[tuple[int, ...], tuple[int, ...]], Region] = {}
    for region in regions:
        boxes.setdefault((region.target_start, region.extent), region)
    found: list[Region] = []
    if covers(tuple(boxes.values()), shape):
        return tuple(boxes.values())
    for region in boxes.values():
        rest = [region]
        for other in found:
            rest = [part for one in rest for part in _without(one, other)]
        found += rest
    return tuple(found)


def _without(region: Region, other: Region) -> Iterator[Region]:
    """Yield the parts of a region outside the box of another: dim by dim, the part before it and the part after it."""
    start = list(region.target_start)
    end = [s + e for s, e in zip(region.target_start, region.extent)]
    low = list(map(max, start, other.target_start))
    high = [min(mine, s + e) for mine, s, e in zip(end, other.target_start, other.extent)]
    if any(a >= b for a, b in zip(low, high)):
        yield region
        return
    for dim in range(len(start)):
        for first, last in ((start[dim], low[dim]), (high[dim], end[dim])):
            corner = (*start[:dim], first, *start[dim + 1 :])
            extent = tuple(b - a for a, b in zip(corner, (*end[:dim], last, *end[dim + 1 :])))
            yield from cut([region], Piece(corner, extent, corner))
        start[dim], end[dim] = low[dim], high[dim]


def _placed(box: _Box, held: str, shape: tuple[int, ...]) -> Iterator[Region]:
    dims = {stride: dim for dim, stride in enumerate(contiguous_strides(shape)) if shape[dim] > 1}
    yield from _place(box, held, shape, dims)


def _place(box: _Box, held: str, shape: tuple[int, ...], dims: dict[int, int]) -> Iterator[Region]:
    for axis, (extent, source, local) in enumerate(box.axes):
        if extent == 1:
            continue
        if source not in dims:
            others = (*box.axes[:axis], *box.axes[axis + 1 :])
            for i in range(extent):
                one = _Box(others, box.source_at + i * source, box.local_at + i * local)
                yield from _place(one, held, shape, dims)
            return
        size = shape[dims[source]]
        start = box.source_at // source % size
        if start + extent <= size:
            continue
        if start == 0 and extent % size == 0:  # whole rows: the rest of the axis is one of the next dim
            inner, outer = (size, source, local), (extent // size, source * size, local * size)
            axes = (*box.axes[:axis], inner, outer, *box.axes[axis + 1 :])
            yield from _place(replace(box, axes=axes), held, shape, dims)
            return
        for part in box.split(axis, size - start if start else extent - extent % size):
            yield from _place(part, held, shape, dims)
        return
    strides, extents = [0] * len(shape), [1] * len(shape)
    for extent, source, local in box.axes:
        if extent > 1:
            extents[dims[source]], strides[dims[source]] = extent, local
    steps = contiguous_strides(shape)
    start_of = tuple(box.source_at // step % size for step, size in zip(steps, shape))
    yield Region(held, box.local_at, tuple(strides), tuple(extents), start_of)

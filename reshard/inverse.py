"""Regions read the other way: from the tensors of the rank files back to the source tensor they were cut from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .regions import Region, contiguous_strides

__all__ = ["invert", "refined_shape"]


def refined_shape(shape: tuple[int, ...], regions: Iterable[Region]) -> tuple[int, ...]:
    """A shape of the same elements in the same order, whose dims are fine enough to say the regions' boxes in.

    A conversion may have seen [64, …] as [2, 32, …]: then the source is written as that, wherever its dims divide.
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
    """A box seen from both sides: `axes` are (extent, stride in the source, stride in the rank's tensor)."""

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
    """What fills the source tensor, of `shape` (a refined one), from the tensor `held` of `local_shape` that `region`
    fills a box of. Where the shape has no dim for one of the box's, there is a region for each index."""
    strides = contiguous_strides(local_shape)
    axes = tuple(
        axis for axis in zip(region.extent, region.strides, strides) if axis[0] > 1 and axis[1]
    )  # an element that was repeated is taken once
    local_at = sum(start * stride for start, stride in zip(region.target_start, strides))
    dims = {stride: dim for dim, stride in enumerate(contiguous_strides(shape)) if shape[dim] > 1}
    yield from _place(_Box(axes, region.offset, local_at), held, shape, dims)


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

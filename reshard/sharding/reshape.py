"""Regions of a reshaped tensor. Integers only: no torch, no files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .regions import Region, contiguous_strides

__all__ = ["reshape"]


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Pair runs of old and new dims that hold the same elements, as numpy's reshape does."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(left), j + len(right)
        a, b = math.prod(old[d] for d in left), math.prod(new[d] for d in right)
        while a != b:
            if a < b:
                left.append(i)
                a, i = a * old[i], i + 1
            else:
                right.append(j)
                b, j = b * new[j], j + 1
        groups.append((left, right))
    return groups


def reshape(regions: Sequence[Region], old: tuple[int, ...], new: tuple[int, ...]) -> list[Region]:
    """Return the regions of the reshaped tensor. A region whose elements no longer form one strided box is split."""
    if 0 in old:
        return []
    groups = _groups(old, new)
    found = []
    for region in regions:
        choices = []
        for before, after in groups:
            runs = _flat_runs(region, before, old)
            shape = tuple(new[d] for d in after)
            choices.append([part for run in runs for part in _unflatten(run, shape)])
        for parts in itertools.product(*choices):
            found.append(
                Region(
                    region.source,
                    region.offset + sum(part.offset for part in parts),
                    tuple(itertools.chain.from_iterable(part.strides for part in parts)),
                    tuple(itertools.chain.from_iterable(part.extent for part in parts)),
                    tuple(itertools.chain.from_iterable(part.start for part in parts)),
                )
            )
    return found


@dataclass(frozen=True, slots=True)
class _Part:
    """The share that some dims have in a region: `offset` is added to the region's."""

    offset: int
    strides: tuple[int, ...]
    extent: tuple[int, ...]
    start: tuple[int, ...]


def _flat_runs(region: Region, dims: Sequence[int], shape: tuple[int, ...]) -> list[_Part]:
    """Flatten `dims` of a region into one dim: as few strided runs as its strides allow."""
    runs = [_Part(0, (0,), (1,), (0,))]
    inner = 1
    for d in reversed(dims):
        stride, extent, start = region.strides[d], region.extent[d], region.target_start[d]
        merged = []
        for run in runs:
            joins = run.extent[0] == inner and (inner == 1 or stride == run.strides[0] * inner)
            if joins or extent == 1:
                step = stride if inner == 1 else run.strides[0]
                merged.append(_Part(run.offset, (step,), (run.extent[0] * extent,), (start * inner + run.start[0],)))
            else:
                merged += [
                    _Part(run.offset + i * stride, run.strides, run.extent, ((start + i) * inner + run.start[0],))
                    for i in range(extent)
                ]
        runs, inner = merged, inner * shape[d]
    return runs


def _unflatten(run: _Part, shape: tuple[int, ...]) -> Iterator[_Part]:
    """Yield a strided run of a flat dim as boxes of `shape`."""
    (stride,), (extent,), (start,) = run.strides, run.extent, run.start
    strides = tuple(stride * step for step in contiguous_strides(shape))
    for box_start, box_extent in _range_boxes(shape, start, start + extent):
        flat = sum(i * step for i, step in zip(box_start, contiguous_strides(shape)))
        yield _Part(run.offset + (flat - start) * stride, strides, box_extent, box_start)


def _range_boxes(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield boxes (start, extent) that tile the flat range `begin`..`end` of a tensor of `shape`."""
    if begin >= end:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row
    if first > last:  # inside one row
        for start, extent in _range_boxes(shape[1:], begin - last * row, end - last * row):
            yield (last, *start), (1, *extent)
        return
    for start, extent in _range_boxes(shape[1:], begin - (first - 1) * row, row):
        yield (first - 1, *start), (1, *extent)
    if last > first:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    for start, extent in _range_boxes(shape[1:], 0, end - last * row):
        yield (last, *start), (1, *extent)

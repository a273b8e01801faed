"""Strided views of one storage: what fills a view after a sequence of writes into others. Integers only.

Views of a storage may have other dims than each other: fused experts are written as [experts, out, in], and flat, and
transposed. All their strides are multiples of each other, so that every place in the storage is a number with one digit
for each stride. A view is then a product of ranges of digits, and so is what two views have in common.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .regions import Region

__all__ = ["View", "filled"]

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class View:
    """A strided view of a storage: `offset` and `strides` in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def last(self) -> int:
        """The place of its last element."""
        return self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))

    def inside(self, start: Sequence[int], extent: Sequence[int]) -> View:
        offset = self.offset + sum(at * stride for at, stride in zip(start, self.strides))
        return View(offset, tuple(extent), self.strides)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements of a source that stand in a box of digits: the first at `offset`, `strides` for each digit."""

    ranges: Ranges
    source: str
    offset: int
    strides: tuple[int, ...]

    def within(self, ranges: Ranges) -> _Piece:
        moved = sum((low - was) * stride for (low, _), (was, _), stride in zip(ranges, self.ranges, self.strides))
        return _Piece(ranges, self.source, self.offset + moved, self.strides)


class _Digits:
    """The digits of places in a storage, from the lowest: how many elements `steps` one is worth, and its size."""

    def __init__(self, views: Iterable[View]) -> None:
        """Raises ValueError if the strides of the views are not multiples of each other."""
        steps = {1}
        last = 0
        for view in views:
            along = [stride for size, stride in zip(view.shape, view.strides) if size > 1]
            if 0 in along or len(set(along)) < len(along):
                raise ValueError(f"a view of {list(view.shape)} with strides {list(view.strides)} overlaps itself")
            steps.update(along)
            last = max(last, view.last)
        self.steps = tuple(sorted(steps))
        sizes = []
        for low, high in itertools.pairwise(self.steps):
            if high % low:
                raise ValueError(f"views with strides {low} and {high} of one tensor")
            sizes.append(high // low)
        self.sizes = (*sizes, last // self.steps[-1] + 1)

    def of_dims(self, view: View) -> list[range]:
        """Return the digits that each dim of a view runs through."""
        found = [range(0)] * len(view.shape)
        order = sorted((stride, dim) for dim, (size, stride) in enumerate(zip(view.shape, view.strides)) if size > 1)
        ends = [*(self.steps.index(stride) for stride, _ in order[1:]), len(self.steps)]
        for (stride, dim), end in zip(order, ends):
            found[dim] = range(self.steps.index(stride), end)
        return found

    def boxes(self, view: View) -> Iterator[tuple[Ranges, tuple[int, ...]]]:
        """Yield the boxes of digits that make up a view, each with the place in the view of its first element.

        Raises ValueError if a dim runs on into another one.
        """
        fixed = [(view.offset // step % size) for step, size in zip(self.steps, self.sizes)]
        parts: list[list[tuple[range, Ranges, int]]] = []
        for digits, size in zip(self.of_dims(view), view.shape):
            if not digits:
                parts.append([(digits, (), 0)])
                continue
            sizes = [self.sizes[digit] for digit in digits]
            start = view.offset // self.steps[digits[0]] % math.prod(sizes)
            if start + size > math.prod(sizes):
                raise ValueError(f"a view of {list(view.shape)} with strides {list(view.strides)} at {view.offset}")
            parts.append([(digits, box, at - start) for box, at in _in_boxes(start, start + size, sizes)])
        for chosen in itertools.product(*parts):
            ranges = [(at, at + 1) for at in fixed]
            for digits, box, _ in chosen:
                for digit, along in zip(digits, box):
                    ranges[digit] = along
            yield tuple(ranges), tuple(at for _, _, at in chosen)


def _in_boxes(start: int, stop: int, sizes: Sequence[int]) -> Iterator[tuple[Ranges, int]]:
    """Split a range of numbers into boxes of their digits, which have `sizes` from the lowest; each with its first."""
    if len(sizes) == 1:
        yield ((start, stop),), start
        return
    step = math.prod(sizes[:-1])
    while start < stop:
        high, low = divmod(start, step)
        if low == 0 and stop - start >= step:
            whole = (stop - start) // step
            yield (*((0, size) for size in sizes[:-1]), (high, high + whole)), start
            start += whole * step
        else:
            end = min(stop, (high + 1) * step)
            for box, at in _in_boxes(low, low + end - start, sizes[:-1]):
                yield (*box, (high, high + 1)), high * step + at
            start = end


class _Layers:
    """What lies on top after pieces were put over each other.

    Fused experts are hundreds of pieces, so each is compared only with those that have places near its own: pieces are
    listed by the stretches of the storage that they reach into.
    """

    def __init__(self, digits: _Digits, pieces: int) -> None:
        self._steps = digits.steps
        size = digits.steps[-1] * digits.sizes[-1]
        self._stretch = max(1, size // (math.isqrt(pieces) + 1))
        self._pieces: dict[int, _Piece] = {}
        self._near: dict[int, set[int]] = defaultdict(set)
        self._count = itertools.count()

    def pieces(self) -> Iterable[_Piece]:
        return self._pieces.values()

    def put(self, piece: _Piece) -> None:
        stretches = self._stretches(piece)
        for key in sorted(set().union(*(self._near[at] for at in stretches))):
            below = self._pieces[key]
            if _meet(piece.ranges, below.ranges):
                del self._pieces[key]
                for at in self._stretches(below):
                    self._near[at].discard(key)
                for rest in _without(below, piece.ranges):
                    self._add(rest, self._stretches(rest))
        self._add(piece, stretches)

    def _add(self, piece: _Piece, stretches: range) -> None:
        key = next(self._count)
        self._pieces[key] = piece
        for at in stretches:
            self._near[at].add(key)

    def _stretches(self, piece: _Piece) -> range:
        first = sum(low * step for (low, _), step in zip(piece.ranges, self._steps))
        last = sum((high - 1) * step for (_, high), step in zip(piece.ranges, self._steps))
        return range(first // self._stretch, last // self._stretch + 1)


def filled(view: View, writes: Sequence[tuple[View, Sequence[Region]]]) -> list[Region]:
    """Return what fills a view after all writes, a later one over an earlier one. Each write fills a view of the same
    storage with regions, whose boxes are in that view.

    Raises ValueError if the views cannot be compared.
    """
    digits = _Digits([view, *(written for written, _ in writes)])
    layers = _Layers(digits, sum(len(regions) for _, regions in writes))
    for written, regions in writes:
        for piece in _pieces(digits, written, regions):
            layers.put(piece)
    of_dims = digits.of_dims(view)
    found: list[Region] = []
    for ranges, start in digits.boxes(view):
        for piece in layers.pieces():
            common = _common(ranges, piece.ranges)
            if common is not None:
                found += _regions(digits, of_dims, ranges, start, piece.within(common))
    return found


def _pieces(digits: _Digits, view: View, regions: Sequence[Region]) -> Iterator[_Piece]:
    for region in regions:
        part = view.inside(region.target_start, region.extent)
        strides = [0] * len(digits.steps)
        for along, stride in zip(digits.of_dims(part), region.strides):
            for digit in along:
                strides[digit] = digits.steps[digit] // digits.steps[along[0]] * stride
        for ranges, at in digits.boxes(part):
            moved = sum(place * stride for place, stride in zip(at, region.strides))
            yield _Piece(ranges, region.source, region.offset + moved, tuple(strides))


def _regions(
    digits: _Digits, of_dims: Sequence[range], ranges: Ranges, start: Sequence[int], piece: _Piece
) -> Iterator[Region]:
    """Yield a piece as regions of a view; `ranges` and `start` are one of the view's boxes, which holds the piece."""
    at, extents, strides = [], [], []
    for dim, along in enumerate(of_dims):
        place, extent, stride = start[dim], 1, 0
        for digit in along:
            low, high = piece.ranges[digit]
            worth = digits.steps[digit] // digits.steps[along[0]]
            place += (low - ranges[digit][0]) * worth
            if high - low == 1:
                continue
            if extent == 1 and worth == 1:
                stride = piece.strides[digit]
            elif worth != extent or piece.strides[digit] != stride * extent:
                for one in range(low, high):  # the box has gaps along this dim of the view
                    part = (*piece.ranges[:digit], (one, one + 1), *piece.ranges[digit + 1 :])
                    yield from _regions(digits, of_dims, ranges, start, piece.within(part))
                return
            extent *= high - low
        at.append(place)
        extents.append(extent)
        strides.append(stride)
    yield Region(piece.source, piece.offset, tuple(strides), tuple(extents), tuple(at))


def _meet(one: Ranges, other: Ranges) -> bool:
    return all(a < d and c < b for (a, b), (c, d) in zip(one, other))


def _common(one: Ranges, other: Ranges) -> Ranges | None:
    found = []
    for (a, b), (c, d) in zip(one, other):
        low, high = (a if a > c else c), (b if b < d else d)
        if low >= high:
            return None
        found.append((low, high))
    return tuple(found)


def _without(piece: _Piece, ranges: Ranges) -> Iterator[_Piece]:
    """Yield what is left of a piece outside a box."""
    common = _common(piece.ranges, ranges)
    if common is None:
        yield piece
        return
    rest = piece.ranges
    for digit, ((low, high), (first, last)) in enumerate(zip(piece.ranges, common)):
        for a, b in ((low, first), (last, high)):
            if a < b:
                yield piece.within((*rest[:digit], (a, b), *rest[digit + 1 :]))
        rest = (*rest[:digit], (first, last), *rest[digit + 1 :])

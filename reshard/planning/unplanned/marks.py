"""Marks: which dim of a tensor holds features that are cut, and what is known of how they can be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Layout", "Mark", "Stream", "merged_view", "met", "one_block", "part_of"]


@dataclass(eq=False, slots=True)
class Stream:
    """Features that are cut alike, because they meet: `items` are as many as all of them have in common, and no rank
    may have a part of one. `why` says where a whole vector is needed; None if nowhere so far."""

    items: int = 0
    why: str | None = None
    joined: Stream | None = None

    def root(self) -> Stream:
        """Return the stream that this one has become a part of."""
        found = self
        while found.joined is not None:
            found = found.joined
        return found

    def end(self, why: str) -> None:
        """Say that a whole vector is needed."""
        root = self.root()
        root.why = root.why or why

    def narrow(self, items: int) -> None:
        """Say that only so many parts can be told apart."""
        root = self.root()
        root.items = math.gcd(root.items, items)

    def join(self, other: Stream) -> None:
        """Say that both are cut alike."""
        one, two = self.root(), other.root()
        if one is not two:
            two.joined = one
            one.items = math.gcd(one.items, two.items)
            one.why = one.why or two.why


@dataclass(eq=False, slots=True)
class Layout:
    """The blocks that stand side by side along the features of one producer: each is cut by itself. `taken` are the
    ranges that the code takes apart. `heads` is the size of the dim that its features are viewed as; `counts` are the
    numbers of heads that it may be."""

    size: int
    counts: frozenset[int] = frozenset()
    taken: set[tuple[int, int]] = field(default_factory=set)
    heads: int | None = None

    def blocks(self) -> tuple[int, ...] | None:
        """Return the sizes of the blocks; None if the code takes ranges that overlap."""
        bounds = sorted({0, self.size, *(bound for pair in self.taken for bound in pair)})
        found = list(itertools.pairwise(bounds))
        return tuple(stop - start for start, stop in found) if self.taken <= {*found, (0, self.size)} else None


@dataclass(frozen=True, slots=True)
class Mark:
    """The dim of a tensor that holds the features of a stream. `layout` is that of the producer whose features they
    still are, one by one; None behind a view or a product."""

    dim: int
    stream: Stream
    layout: Layout | None = None

    def at(self, dim: int) -> Mark:
        """Return the same mark on another dim."""
        return Mark(dim, self.stream, self.layout)


def met(marks: Sequence[Mark], dim: int) -> Mark:
    """Join the streams of marks that meet on a dim."""
    for mark in marks[1:]:
        marks[0].stream.join(mark.stream)
    layouts = {id(mark.layout): mark.layout for mark in marks}
    if len(layouts) == 1:
        return marks[0].at(dim)
    for mark in marks:
        one_block(mark)
    return Mark(dim, marks[0].stream)


def one_block(mark: Mark) -> None:
    """Say that all features of a producer are used as they stand."""
    if mark.layout is not None:
        mark.layout.taken.add((0, mark.layout.size))


def merged_view(mark: Mark, before: list[tuple[int, int]], after: list[tuple[int, int]]) -> Mark | None:
    """Return the mark behind a view that makes the dims `after` of the dims `before`, (dim, size), the mark's among
    them. None if the features would not be side by side."""
    before = [pair for pair in before if pair[1] != 1 or pair[0] == mark.dim]
    after = [pair for pair in after if pair[1] != 1] or after[:1]
    if len(before) == 1 and len(after) == 1:
        return mark.at(after[0][0])
    if len(before) == 1:
        return _split_view(mark, before[0][1], after)
    if before[0][0] != mark.dim:
        return None
    first, size = after[0]
    one_block(mark)
    mark.stream.narrow(size)
    return Mark(first, mark.stream)


def _split_view(mark: Mark, size: int, after: list[tuple[int, int]]) -> Mark | None:
    """Return the mark of features that are viewed as several dims: that of the heads, by their number, else the first.

    Dims in front of it are blocks that stand side by side, such as query, key and value.
    """
    counts = mark.layout.counts if mark.layout else ()
    place = next((at for at, (_, count) in enumerate(after) if count in counts), 0)
    dim, count = after[place]
    blocks = math.prod(count for _, count in after[:place])
    if blocks > 1:
        if mark.layout is None:
            return None
        mark.layout.taken |= {(at * size // blocks, (at + 1) * size // blocks) for at in range(blocks)}
    else:
        one_block(mark)
    if mark.layout is not None:
        if mark.layout.heads not in (None, count):
            return None
        mark.layout.heads = count
    mark.stream.narrow(count)
    return Mark(dim, mark.stream)


def part_of(mark: Mark, start: int, stop: int) -> Mark | None:
    """Return the mark of a range of a producer's features: a block of its own."""
    if mark.layout is None:
        return None
    mark.layout.taken.add((start, stop))
    mark.stream.narrow(stop - start)
    return Mark(mark.dim, mark.stream, Layout(stop - start, mark.layout.counts))

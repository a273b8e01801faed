"""Dealing: which rank gets which items, where an item (an attention head, an expert) must stay whole. Integers only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from .placement import Nested, PackedShard, Placement, Ranges, Replicate, Shard, ranges_of, shard_bounds

__all__ = [
    "HeadDeal",
    "deal",
    "deal_heads",
    "deal_units",
    "in_units",
    "placement_of_heads",
    "placement_of_ranges",
    "scaled",
]

Range = tuple[int, int]  # start and stop


def deal(items: int, ranks: int) -> tuple[Range, ...]:
    """Deal `items` out as evenly as can be: no rank gets two more than another, and earlier ranks get more.

    torch.chunk gives every rank but the last the same, so that of 8 items on 5 ranks the last gets none.
    """
    least, more = divmod(items, ranks)
    stops = list(itertools.accumulate(least + (rank < more) for rank in range(ranks)))
    return tuple(zip([0, *stops], stops))


@dataclass(frozen=True, slots=True)
class HeadDeal:
    """The heads of an attention on each rank.

    `query` is each rank's range of query heads. `key_value` lists, for each rank, the KV heads that its query heads
    use, in order; one that stands several times there is held several times. `groups` is the number of query heads for
    each KV head that the rank holds.
    """

    query: tuple[Range, ...]
    key_value: tuple[tuple[Range, ...], ...]
    groups: tuple[int, ...]

    def held(self, *, is_query: bool) -> tuple[tuple[Range, ...], ...]:
        """Return each rank's ranges of query heads or of KV heads."""
        return tuple((part,) for part in self.query) if is_query else self.key_value


def deal_units(size: int, unit: int, ranks: int) -> tuple[Range, ...]:
    """Deal `size` elements out in units that stay together; the last unit may be smaller."""
    return tuple((min(start, size), min(stop, size)) for start, stop in scaled(deal(-(-size // unit), ranks), unit))


def in_units(placement: Placement, size: int, unit: int, ranks: int) -> Placement:
    """Return a placement of a dim of `size` elements that cuts no unit in two, if there is a unit for each rank.

    Parts that are whole units already stay as they are. With fewer units than ranks, they stay so too.
    """
    if unit == 1 or not isinstance(placement, (Shard, PackedShard)):
        return placement
    blocks = placement.blocks if isinstance(placement, PackedShard) else (size,)
    bounds = {
        bound for block in blocks for rank in range(ranks) for bound in shard_bounds(block, rank=rank, world_size=ranks)
    }
    if all(bound % unit == 0 or bound in blocks for bound in bounds) or min(blocks) <= unit * (ranks - 1):
        return placement
    starts = [0, *itertools.accumulate(blocks)]
    dealt = [deal_units(block, unit, ranks) for block in blocks]
    held = [
        tuple((first + of_block[rank][0], first + of_block[rank][1]) for first, of_block in zip(starts, dealt))
        for rank in range(ranks)
    ]
    return placement_of_ranges(placement.dim, size, held)


def deal_heads(query: int, key_value: int, ranks: int, together: int = 1) -> HeadDeal:
    """Deal the heads of an attention with `query` heads, a multiple of `key_value`, to at most as many ranks. As many
    KV heads as `together` stay together, if there are so many of these units as ranks.

    If there are enough KV heads, ranks get whole groups: a KV head with its query heads. If there are fewer KV heads
    than ranks, the ranks of a KV head deal its query heads among them. If that left a rank more query heads than an
    even deal does, the query heads are dealt evenly, and a rank may then have parts of several groups. An attention
    uses each of its KV heads for the same number of query heads, so such a rank holds some KV heads several times.

    Raises:
        ValueError: there are fewer query heads than ranks, or `query` is no multiple of `key_value`.
    """
    if query < ranks or query % key_value:
        raise ValueError(f"{query} query heads and {key_value} KV heads cannot be dealt to {ranks} ranks")
    group = query // key_value
    if key_value >= ranks:
        held = deal(key_value, ranks)
        if any(start % together for start, _ in held) and -(-key_value // together) >= ranks:
            held = deal_units(key_value, together, ranks)
        return HeadDeal(scaled(held, group), tuple((part,) for part in held), (group,) * ranks)
    mine = [
        (head * group + start, head * group + stop)
        for head, (first, last) in enumerate(deal(ranks, key_value))
        for start, stop in deal(group, last - first)
    ]
    even = deal(query, ranks)
    if max(stop - start for start, stop in mine) > max(stop - start for start, stop in even):
        mine = list(even)
    groups, heads = zip(*(_used(part, group) for part in mine))
    return HeadDeal(tuple(mine), heads, groups)


def _used(query: Range, group: int) -> tuple[int, tuple[Range, ...]]:
    """Return the number of query heads for each KV head that a rank holds, and these KV heads."""
    start, stop = query
    runs = {
        head: min(stop, (head + 1) * group) - max(start, head * group)
        for head in range(start // group, (stop - 1) // group + 1)
    }
    size = math.gcd(*runs.values())
    if all(run == size for run in runs.values()):
        return size, ((min(runs), max(runs) + 1),)
    return size, tuple((head, head + 1) for head, run in runs.items() for _ in range(run // size))


def scaled(ranges: Sequence[Range], unit: int) -> tuple[Range, ...]:
    """Return ranges of items as ranges of elements, `unit` for each item."""
    return tuple((start * unit, stop * unit) for start, stop in ranges)


def placement_of_ranges(dim: int, size: int, ranges: Sequence[Sequence[Range]]) -> Placement:
    """Return the plainest placement that gives each rank its ranges of `dim`, which has `size` elements."""
    world_size = len(ranges)
    held = tuple(map(tuple, ranges))
    for row in range(1, world_size + 1):
        rows = world_size // row
        if world_size % row == 0 and all(
            held[rank] == tuple(ranges_of(Shard(dim), size, rank=rank // row, world_size=rows))
            for rank in range(world_size)
        ):
            return Shard(dim) if row == 1 else Nested(Shard(dim), Replicate(), row)
    return Ranges(dim, held)


@lru_cache(maxsize=1024)  # so that all layers share one object
def placement_of_heads(
    query: int, key_value: int, *, is_query: bool, dim: int, unit: int, ranks: int, together: int = 1
) -> Placement:
    """Return the placement of a dim of whole heads, query heads or KV heads, of `unit` elements each. `together` is as
    for `deal_heads`.

    Raises ValueError as `deal_heads` does.
    """
    mine = deal_heads(query, key_value, ranks, together).held(is_query=is_query)
    size = unit * (query if is_query else key_value)
    return placement_of_ranges(dim, size, [scaled(parts, unit) for parts in mine])

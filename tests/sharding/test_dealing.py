"""Heads and experts dealt to any number of ranks: nothing is lost, no rank has more than it must."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reshard.sharding.dealing import deal, deal_heads, placement_of_ranges, scaled
from reshard.sharding.placement import Nested, Ranges, Replicate, Shard, pieces
from reshard.strategies import take


@st.composite
def heads(draw: st.DrawFn) -> tuple[int, int, int]:
    """Draw a number of query heads, of KV heads, and of ranks."""
    key_value = draw(st.integers(1, 12))
    query = key_value * draw(st.integers(1, 9))
    return query, key_value, draw(st.integers(1, query))


@given(st.integers(0, 300), st.integers(1, 70))
def test_deal(items: int, ranks: int) -> None:
    found = deal(items, ranks)
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == items
    sizes = [stop - start for start, stop in found]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    if items % ranks == 0:
        assert sizes == [len(part) for part in torch.arange(items).chunk(ranks)] or items == 0


@given(heads())
def test_every_query_head_has_its_own_kv_head(case: tuple[int, int, int]) -> None:
    query, key_value, ranks = case
    group = query // key_value
    found = deal_heads(*case)
    assert [head for start, stop in found.query for head in range(start, stop)] == list(range(query))
    for (start, stop), held, groups in zip(found.query, found.key_value, found.groups, strict=True):
        kv = [head for low, high in held for head in range(low, high)]
        assert len(kv) * groups == stop - start > 0
        # As attention repeats its KV heads: local query head i uses KV head i // groups.
        assert [kv[i // groups] for i in range(stop - start)] == [head // group for head in range(start, stop)]
    most = max(stop - start for start, stop in found.query)
    assert most == (-(-key_value // ranks) * group if key_value >= ranks else -(-query // ranks))


@given(heads())
def test_a_kv_head_is_repeated_only_for_parts_of_groups(case: tuple[int, int, int]) -> None:
    query, key_value, _ = case
    group = query // key_value
    for (start, stop), held in zip(deal_heads(*case).query, deal_heads(*case).key_value, strict=True):
        kv = [head for low, high in held for head in range(low, high)]
        if len(set(kv)) < len(kv):
            parts = {min(stop, (head + 1) * group) - max(start, head * group) for head in kv}
            assert len(parts) > 1


def test_known_deals() -> None:
    assert deal_heads(32, 8, 3).key_value == (((0, 3),), ((3, 6),), ((6, 8),))
    assert deal_heads(32, 8, 3).query == ((0, 12), (12, 24), (24, 32))
    shared = deal_heads(28, 4, 8)
    assert shared.groups == (4, 3, 4, 3, 4, 3, 4, 3)
    assert shared.key_value == tuple(((head // 2, head // 2 + 1),) for head in range(8))
    assert deal_heads(9, 3, 4).query == ((0, 2), (2, 3), (3, 6), (6, 9))  # no rank has more than 3, as dealt evenly
    across = deal_heads(9, 3, 5)
    assert across.query == ((0, 2), (2, 4), (4, 6), (6, 8), (8, 9))
    assert across.key_value == (((0, 1),), ((0, 2),), ((1, 2),), ((2, 3),), ((2, 3),))
    assert across.groups == (2, 1, 2, 2, 1)
    parts = deal_heads(14, 2, 3)  # of 5, 5 and 4: the second has 2 of one group and 3 of the other
    assert parts.key_value[1] == ((0, 1), (0, 1), (1, 2), (1, 2), (1, 2))
    assert parts.groups == (5, 1, 4)


@pytest.mark.parametrize(("query", "key_value", "ranks"), [(8, 2, 9), (8, 3, 2), (1, 1, 2)])
def test_what_cannot_be_dealt(query: int, key_value: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="cannot be dealt"):
        deal_heads(query, key_value, ranks)


@given(heads(), st.integers(1, 5), st.integers(0, 1))
def test_parts_put_together_are_the_whole(case: tuple[int, int, int], unit: int, dim: int) -> None:
    query, key_value, ranks = case
    found = deal_heads(*case)
    for count, held in ((query, [(part,) for part in found.query]), (key_value, found.key_value)):
        size = count * unit
        placement = placement_of_ranges(dim, size, [scaled(parts, unit) for parts in held])
        whole = torch.randint(-128, 128, (size, 3) if dim == 0 else (3, size), dtype=torch.int8)
        merged = torch.zeros_like(whole)
        filled = torch.zeros_like(whole, dtype=torch.bool)
        for rank in range(ranks):
            local = take(whole, placement, tuple(whole.shape), rank=rank, world_size=ranks)
            want = [whole.narrow(dim, start * unit, (stop - start) * unit) for start, stop in held[rank]]
            assert torch.equal(local, torch.cat(want, dim))
            for piece in pieces(placement, tuple(whole.shape), rank=rank, world_size=ranks):
                there = tuple(slice(start, start + extent) for start, extent in zip(piece.start, piece.extent))
                here = tuple(slice(start, start + extent) for start, extent in zip(piece.local_start, piece.extent))
                merged[there], filled[there] = local[here], True
        assert filled.all()
        assert torch.equal(merged, whole)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 4))
def test_the_plainest_placement_is_found(size: int, rows: int, row: int) -> None:
    whole = torch.arange(size)
    chunks = [*torch.chunk(whole, rows), *[whole[:0]] * rows][:rows]
    ranges = []
    for chunk in chunks:
        start = int(chunk[0]) if len(chunk) else size
        ranges += [((start, start + len(chunk)),)] * row
    found = placement_of_ranges(0, size, ranges)
    assert found == (Shard(0) if row == 1 else Nested(Shard(0), Replicate(), row))


def test_uneven_parts_are_ranges() -> None:
    assert placement_of_ranges(1, 8, [[(0, 2)], [(2, 4)], [(4, 6)], [(6, 7)], [(7, 8)]]) == Ranges(
        1, (((0, 2),), ((2, 4),), ((4, 6),), ((6, 7),), ((7, 8),))
    )

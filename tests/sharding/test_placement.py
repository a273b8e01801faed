"""Placements against torch: every range, shape and piece is what torch.chunk and slicing give."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from cutting import chunk, oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.sharding.placement import (
    Explicit,
    Nested,
    PackedShard,
    Piece,
    Placement,
    Replicate,
    Shard,
    block_sizes,
    is_box,
    local_shape,
    offset,
    pieces,
    shard_bounds,
    shared,
)

WORLD_SIZES = st.integers(1, 9)


def box(start: Sequence[int], extent: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(s, s + e) for s, e in zip(start, extent))


@st.composite
def placed_shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], Placement]:
    """Draw a shape (0-d, empty dims and dims of one included) and a placement that fits it."""
    shape = draw(st.lists(st.integers(0, 7), max_size=4))
    kind = draw(st.sampled_from(["replicate", "shard", "packed"])) if shape else "replicate"
    if kind == "replicate":
        return tuple(shape), Replicate()
    dim = draw(st.integers(0, len(shape) - 1))
    if kind == "shard":
        return tuple(shape), Shard(dim)
    blocks = draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    shape[dim] = sum(blocks)
    return tuple(shape), PackedShard(dim, tuple(blocks))


@pytest.mark.parametrize("world_size", range(1, 10))
def test_bounds_are_those_of_torch_chunk(world_size: int) -> None:
    for size in range(40):
        whole = torch.arange(size)
        for rank in range(world_size):
            start, stop = shard_bounds(size, rank=rank, world_size=world_size)
            assert 0 <= start <= stop <= size
            assert whole[start:stop].tolist() == chunk(whole, 0, rank, world_size).tolist()


def test_bounds_by_example() -> None:
    assert [shard_bounds(10, rank=r, world_size=4) for r in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [shard_bounds(5, rank=r, world_size=4) for r in range(4)] == [(0, 2), (2, 4), (4, 5), (5, 5)]


@settings(max_examples=300, deadline=None)
@given(placed_shapes(), WORLD_SIZES)
def test_pieces_and_local_shape_are_torchs(placed: tuple[tuple[int, ...], Placement], world_size: int) -> None:
    shape, placement = placed
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for rank in range(world_size):
        expected = oracle(tensor, placement, rank, world_size)
        assert local_shape(placement, shape, rank=rank, world_size=world_size) == tuple(expected.shape)
        local = torch.full(expected.shape, -1)
        for piece in pieces(placement, shape, rank=rank, world_size=world_size):
            assert 0 not in piece.extent
            local[box(piece.local_start, piece.extent)] = tensor[box(piece.start, piece.extent)]
        assert torch.equal(local, expected)


@settings(max_examples=200, deadline=None)
@given(placed_shapes(), WORLD_SIZES)
def test_pieces_of_all_ranks_tile_the_tensor_once(placed: tuple[tuple[int, ...], Placement], world_size: int) -> None:
    shape, placement = placed
    times = torch.zeros(shape, dtype=torch.int64)
    for rank in range(world_size):
        for piece in pieces(placement, shape, rank=rank, world_size=world_size):
            times[box(piece.start, piece.extent)] += 1
    assert (times == (world_size if isinstance(placement, Replicate) else 1)).all()


def test_scalar_is_one_piece_and_an_empty_tensor_none() -> None:
    (piece,) = pieces(Replicate(), (), rank=1, world_size=3)
    assert (piece.start, piece.extent, piece.local_start) == ((), (), ())
    for placement in (Replicate(), Shard(0), Shard(1), PackedShard(0, (2, 2))):
        assert pieces(placement, (4, 0), rank=0, world_size=2) == ()


@pytest.mark.parametrize(
    ("size", "blocks", "expected"),
    [
        (12, 2, (6, 6)),
        (12, 1, (12,)),
        (12, [4, 1, 1], (8, 2, 2)),
        (12, (1, 2), (4, 8)),
        (12, [3, 0, 1], (9, 0, 3)),
        (0, 2, (0, 0)),
    ],
)
def test_block_sizes(size: int, blocks: int | list[int], expected: tuple[int, ...]) -> None:
    assert block_sizes(size, blocks) == expected


@pytest.mark.parametrize("blocks", [0, -1, 5, [], [0, 0], [3, -1], [4, 3]])
def test_block_sizes_that_do_not_fit(blocks: int | list[int]) -> None:
    with pytest.raises(ValueError, match="12 elements cannot be packed"):
        block_sizes(12, blocks)


def test_blocks_must_fill_the_dim() -> None:
    packed = PackedShard(0, (3, 4))
    with pytest.raises(ValueError, match="do not fill a dim of 8"):
        pieces(packed, (8, 2), rank=0, world_size=2)
    with pytest.raises(ValueError, match="do not fill a dim of 8"):
        local_shape(packed, (8, 2), rank=0, world_size=2)


@st.composite
def nested(draw: st.DrawFn) -> tuple[tuple[int, ...], Nested, int]:
    """Draw a shape, a placement over rows of ranks and within them along two dims, and the number of rows."""
    rows, row = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    sizes, cuts = [], []
    for _ in range(2):
        blocks = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
        sizes.append(sum(blocks))
        cuts.append(tuple(blocks))
    shape = (sizes[0], 2, sizes[1])
    outer: Placement = PackedShard(0, cuts[0]) if len(cuts[0]) > 1 else Shard(0)
    inner: Placement = PackedShard(2, cuts[1]) if len(cuts[1]) > 1 else Shard(2)
    if draw(st.booleans()):
        inner = Replicate()
    assert not isinstance(outer, Replicate)
    return shape, Nested(outer, inner, row), rows


@settings(max_examples=300, deadline=None)
@given(nested())
def test_nested_is_one_cut_after_the_other(case: tuple[tuple[int, ...], Nested, int]) -> None:
    """The outer placement cuts over rows, then the inner one cuts each row's part over its ranks."""
    shape, placement, rows = case
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for rank in range(rows * placement.row):
        held = oracle(tensor, placement.outer, rank // placement.row, rows)
        expected = oracle(held, placement.inner, rank % placement.row, placement.row)
        at = {"rank": rank, "world_size": rows * placement.row}
        local = torch.full(expected.shape, -1)
        assert local_shape(placement, shape, **at) == tuple(expected.shape)
        for piece in pieces(placement, shape, **at):
            assert 0 not in piece.extent
            local[box(piece.local_start, piece.extent)] = tensor[box(piece.start, piece.extent)]
        assert torch.equal(local, expected)
        explicit = Explicit((tuple(expected.shape),) * (rank + 1), (pieces(placement, shape, **at),) * (rank + 1))
        assert pieces(explicit, shape, **at) == pieces(placement, shape, **at)
        assert local_shape(explicit, shape, **at) == tuple(expected.shape)


def test_sharing_a_cut_among_ranks_in_a_row() -> None:
    assert shared(Shard(1), 1) == Shard(1)
    assert shared(Replicate(), 3) == Replicate()
    assert shared(Shard(1), 2) == Nested(Shard(1), Replicate(), 2)
    assert shared(Nested(Shard(0), Replicate(), 2), 3) == Nested(Shard(0), Replicate(), 6)
    for already in (Nested(Shard(0), Shard(1), 2), Explicit(((1,),), ((),))):
        with pytest.raises(ValueError, match="cannot be shared"):
            shared(already, 2)


def test_offsets_and_boxes() -> None:
    at = {"rank": 3, "world_size": 4}
    assert offset(Shard(0), (10, 2), **at) == (9, 0)
    assert offset(Shard(0), (3, 2), **at) == (3, 0)  # holds nothing: past the end
    assert offset(Nested(Shard(0), Replicate(), 2), (10, 2), **at) == (5, 0)
    assert offset(Replicate(), (10, 2), **at) == (0, 0)
    assert is_box(Nested(Shard(0), Shard(1), 2))
    assert not is_box(Nested(Shard(0), PackedShard(1, (1, 1)), 2))
    assert not is_box(PackedShard(0, (1, 1)))
    assert not is_box(Explicit(((1,), (0,)), ((Piece((0,), (1,), (0,)),), ())))

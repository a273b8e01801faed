"""Regions against torch: cuts, tilings and runs are checked on real elements."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from symbolic_programs import programs, run

from reshard.sharding.placement import Piece
from reshard.sharding.regions import (
    Region,
    boxes,
    contiguous_strides,
    covers,
    cut,
    is_run,
    run_length,
    run_starts,
    whole,
)
from reshard.strategies.symbolic import RegionTensor

SHAPES = st.lists(st.integers(1, 6), max_size=4).map(tuple)


def materialise(regions: Sequence[Region], shape: Sequence[int], sources: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the tensor that `regions` describe; elements that none of them fills are -1."""
    out = torch.full(tuple(shape), -1)
    for r in regions:
        view = torch.as_strided(sources[r.source], r.extent, r.strides, r.offset)
        out[tuple(slice(s, s + e) for s, e in zip(r.target_start, r.extent))] = view
    return out


@settings(max_examples=200, deadline=None)
@given(programs(), st.data())
def test_cut_is_slicing(program: tuple[tuple[int, ...], list], data: st.DataObject) -> None:
    shape, steps = program
    source = torch.arange(math.prod(shape)).reshape(shape)
    expected, symbolic = source, RegionTensor.of_source("x", shape, torch.int64)
    for step in steps:
        expected, symbolic = run(expected, step), run(symbolic, step)
    start = tuple(data.draw(st.integers(0, size - 1)) for size in expected.shape)
    extent = tuple(data.draw(st.integers(1, size - s)) for s, size in zip(start, expected.shape))
    local = tuple(data.draw(st.integers(0, 3)) for _ in start)
    found = cut(symbolic.regions, Piece(start, extent, local))

    out = materialise(found, [at + e for at, e in zip(local, extent)], {"x": source})
    inside = tuple(slice(at, at + e) for at, e in zip(local, extent))
    assert torch.equal(out[inside], expected[tuple(slice(s, s + e) for s, e in zip(start, extent))])
    assert (out == -1).sum() == out.numel() - math.prod(extent)  # nothing lies outside the box


def test_cut_leaves_out_what_lies_elsewhere() -> None:
    assert cut(whole("x", (4, 4)), Piece((4, 0), (2, 4), (0, 0))) == ()
    assert cut(whole("x", ()), Piece((), (), ())) == whole("x", ())
    assert whole("x", (3, 0)) == ()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=4).map(tuple), st.integers(1, 300))
def test_boxes_tile_in_memory_order(shape: tuple[int, ...], limit: int) -> None:
    """The flat indices of the boxes in order are 0, 1, 2 …, so each box is a run and they tile in order."""
    flat = torch.arange(math.prod(shape)).reshape(shape)
    at = 0
    for box in boxes(shape, limit):
        inside = flat[tuple(slice(s, s + e) for s, e in zip(box.start, box.extent))]
        assert box.offset == at
        assert box.size == inside.numel() <= limit
        assert inside.flatten().tolist() == list(range(at, at + box.size))
        at += box.size
    assert at == flat.numel()


def test_boxes_hold_one_element_at_least() -> None:
    assert [box.offset for box in boxes((2, 2), 0)] == [0, 1, 2, 3]


def test_boxes_are_few() -> None:
    """A limit of half the tensor gives two boxes, not one per row."""
    assert len(list(boxes((8, 3, 5), 60))) == 2
    assert len(list(boxes((8, 3, 5), 10_000))) == 1


def target_box(start: Sequence[int], extent: Sequence[int]) -> Region:
    return Region("x", 0, contiguous_strides(extent), tuple(extent), tuple(start))


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Region]:
    """Draw a tiling: a box cut in two, again and again."""
    found = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 8))):
        start, extent = found.pop(draw(st.integers(0, len(found) - 1)))
        wide = [d for d, size in enumerate(extent) if size > 1]
        if not wide:
            found.append((start, extent))
            continue
        dim = draw(st.sampled_from(wide))
        at = draw(st.integers(1, extent[dim] - 1))
        found.append((start, (*extent[:dim], at, *extent[dim + 1 :])))
        found.append(
            ((*start[:dim], start[dim] + at, *start[dim + 1 :]), (*extent[:dim], extent[dim] - at, *extent[dim + 1 :]))
        )
    return [target_box(*item) for item in draw(st.permutations(found))]


def tiles_once(regions: Sequence[Region], shape: Sequence[int]) -> bool:
    """Whether the regions tile the shape once, by counting every element."""
    cells = [
        cell
        for r in regions
        for cell in itertools.product(*(range(s, s + e) for s, e in zip(r.target_start, r.extent)))
    ]
    return sorted(cells) == list(itertools.product(*(range(size) for size in shape)))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_tiling_covers(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    assert covers(data.draw(tilings(shape)), shape)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_covers_detects_holes_overlaps_and_what_is_outside(data: st.DataObject) -> None:
    """Tilings with one box moved, resized, dropped or doubled are compared with counting."""
    shape = data.draw(SHAPES.filter(bool))
    regions = data.draw(tilings(shape))
    i = data.draw(st.integers(0, len(regions) - 1))
    region = regions.pop(i)
    for _ in range(data.draw(st.integers(0, 2))):
        dim = data.draw(st.integers(0, len(shape) - 1))
        start, extent = list(region.target_start), list(region.extent)
        start[dim] += data.draw(st.integers(-2, 2))
        extent[dim] = max(1, extent[dim] + data.draw(st.integers(-1, 1)))
        regions.append(target_box(start, extent))
    assert covers(regions, shape) == tiles_once(regions, shape)


def test_covers_by_example() -> None:
    left, right = target_box((0, 0), (2, 2)), target_box((0, 2), (2, 2))
    assert covers([left, right], (2, 4))
    assert not covers([left], (2, 4))
    assert not covers([left, left], (2, 4))  # as many elements as the tensor, but with a hole and an overlap
    assert not covers([left, target_box((0, 3), (2, 2))], (2, 4))
    assert not covers([left, right], (2, 3))
    assert covers([target_box((), ())], ())
    assert not covers([], ())
    assert covers([], (3, 0))


@pytest.mark.parametrize(
    ("strides", "extent", "expected"),
    [
        ((4, 1), (3, 4), True),
        ((4, 1), (3, 2), False),
        ((4, 1), (1, 2), True),
        ((99, 4, 1), (1, 2, 4), True),  # the stride of a dim of one is never used
        ((1, 3), (3, 3), False),
        ((2,), (3,), False),
        ((0,), (3,), False),
        ((), (), True),
    ],
)
def test_is_run(strides: tuple[int, ...], extent: tuple[int, ...], expected: bool) -> None:
    assert is_run(Region("x", 7, strides, extent, (0,) * len(extent))) is expected


@settings(max_examples=200, deadline=None)
@given(programs())
def test_is_run_says_whether_elements_are_consecutive(program: tuple[tuple[int, ...], list]) -> None:
    shape, steps = program
    symbolic = RegionTensor.of_source("x", shape, torch.int64)
    for step in steps:
        symbolic = run(symbolic, step)
    flat = torch.arange(math.prod(shape))
    for region in symbolic.regions:
        taken = torch.as_strided(flat, region.extent, region.strides, region.offset).flatten().tolist()
        assert is_run(region) == (taken == list(range(region.offset, region.offset + region.size)))


@settings(max_examples=300, deadline=None)
@given(programs(), st.data())
def test_runs_are_the_elements(program: tuple[tuple[int, ...], list], data: st.DataObject) -> None:
    """Copied run by run, the regions of a part are torch's elements; no run goes on where another ends."""
    shape, steps = program
    source = torch.arange(math.prod(shape)).reshape(shape)
    symbolic = RegionTensor.of_source("x", shape, torch.int64)
    for step in steps:
        symbolic = run(symbolic, step)
    whole_shape = tuple(symbolic.shape)
    start = tuple(data.draw(st.integers(0, size - 1)) for size in whole_shape)
    extent = tuple(data.draw(st.integers(1, size - s)) for s, size in zip(start, whole_shape))
    found = cut(symbolic.regions, Piece(start, extent, (0,) * len(extent)))
    out, flat = [-1] * math.prod(extent), source.flatten().tolist()
    for region in found:
        length = run_length(region, extent)
        starts = list(zip(*run_starts(region, extent)))
        assert len(starts) * length == region.size
        for at, to in starts:
            out[to : to + length] = flat[at : at + length]
        assert [(at * 4, to * 4) for at, to in starts] == list(zip(*run_starts(region, extent, width=4)))
    assert torch.equal(torch.tensor(out).reshape(extent), materialise(found, extent, {"x": source}))

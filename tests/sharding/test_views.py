"""Views of one storage, against numpy: what is written through some views is found again through others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.sharding.regions import Region
from reshard.sharding.views import View, filled


@st.composite
def views(draw: Any, factors: tuple[int, ...]) -> View:
    """A view of a C-ordered storage: some of its dims merged, sliced, permuted, or fixed at one place."""
    shape: list[int] = []
    for factor in factors:
        if shape and draw(st.booleans()):
            shape[-1] *= factor
        else:
            shape.append(factor)
    array = np.arange(math.prod(factors)).reshape(shape)
    index: list[Any] = []
    for size in shape:
        low = draw(st.integers(0, size - 1))
        high = draw(st.integers(low + 1, size))
        index.append(low if draw(st.integers(0, 3)) == 0 else slice(low, high) if draw(st.booleans()) else slice(None))
    array = array[tuple(index)]
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    return View(int(array.flat[0]), array.shape, tuple(stride // array.itemsize for stride in array.strides))


def places(view: View) -> Any:
    grid = np.full(view.shape, view.offset)
    for dim, (size, stride) in enumerate(zip(view.shape, view.strides)):
        grid = grid + (np.arange(size) * stride).reshape([-1 if one == dim else 1 for one in range(len(view.shape))])
    return grid


@given(st.data())
def test_later_writes_are_over_earlier_ones(data: st.DataObject) -> None:
    factors = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    storage = np.full(math.prod(factors), -1)
    writes = []
    for number in range(data.draw(st.integers(0, 5))):
        view = data.draw(views(factors))
        strides = tuple(data.draw(st.sampled_from((0, 1, 3, 7, 20))) for _ in view.shape)
        region = Region(f"{number}", 1000 * number, strides, view.shape, (0,) * len(view.shape))
        storage[places(view)] = places(View(1000 * number, view.shape, strides))
        writes.append((view, [region]))
    view = data.draw(views(factors))
    found = np.full(view.shape, -1)
    for region in filled(view, writes):
        box = tuple(slice(at, at + size) for at, size in zip(region.target_start, region.extent))
        assert (found[box] == -1).all()
        found[box] = places(View(region.offset, region.extent, region.strides))
    assert np.array_equal(found, storage[places(view)])


def test_fused_matrices_are_one_region_each() -> None:
    """gate and up, written one after the other into [experts, 2 · 3, 4], and read as a whole."""
    whole = View(0, (2, 6, 4), (24, 4, 1))
    writes = [
        (View(24 * expert + 12 * half, (3, 4), (4, 1)), [Region(f"{expert}{half}", 5, (4, 1), (3, 4), (0, 0))])
        for expert in range(2)
        for half in range(2)
    ]
    found = sorted(filled(whole, writes), key=lambda region: region.source)
    assert [(r.source, r.extent, r.target_start) for r in found] == [
        (f"{expert}{half}", (1, 3, 4), (expert, 3 * half, 0)) for expert in range(2) for half in range(2)
    ]


@pytest.mark.parametrize("view", [View(0, (2, 3), (0, 1)), View(0, (2, 3), (1, 1)), View(0, (3, 2), (3, 2))])
def test_a_view_that_overlaps_itself_is_refused(view: View) -> None:
    with pytest.raises(ValueError, match="strides"):
        filled(view, [(View(0, (6,), (1,)), [])])

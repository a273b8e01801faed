"""Recipes: what a matrix becomes when it is quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

__all__ = ["Made", "Read", "Recipe", "constant", "tiles"]

_AT_ONCE = 1 << 17  # elements: what is in between stays in the cache of a core

Read = Callable[[int, int, int, int], torch.Tensor]
"""Read rows `start` to `stop`, and columns `start` to `stop`, of the matrix: [rows, columns], in its own dtype."""


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that a recipe makes of a matrix: its name ends with `suffix`, its dtype is `dtype` (torch's name).

    `shape` is the one that it is stored in. `box` makes rows and entries of it, [rows, entries], of the `grid` that it
    is seen in, which has as many entries in all. `matrix` is the shape that `box` reads the matrix in: its own, or one
    row of all its elements.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    grid: tuple[int, int]
    matrix: tuple[int, int]
    box: Callable[[Read, int, int, int, int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How matrices are quantized.

    `made` gives the tensors of a matrix of a shape [out, in] and a dtype. If they depend on a number that all of the
    matrix decides, `measure` finds it, from the matrix as one row of so many elements; else it is None. `fits` says
    whether a matrix can be quantized.
    """

    made: Callable[[tuple[int, int], str, float | None], tuple[Made, ...]]
    measure: Callable[[Read, int], float] | None = None
    fits: Callable[[tuple[int, int]], bool] = lambda _: True


def tiles(
    rows: tuple[int, int], columns: tuple[int, int], unit: tuple[int, int]
) -> Iterator[tuple[int, int, int, int]]:
    """Split a box of a matrix into tiles of about as many elements as stay in a cache, at multiples of `unit` if it
    begins at one. Yield the rows and columns of each."""
    width = max(unit[1], min(-(-(columns[1] - columns[0]) // unit[1]), _AT_ONCE // unit[0] // unit[1]) * unit[1])
    height = max(unit[0], _AT_ONCE // width // unit[0] * unit[0])
    for top in range(rows[0], rows[1], height):
        for left in range(columns[0], columns[1], width):
            yield top, min(top + height, rows[1]), left, min(left + width, columns[1])


def constant(suffix: str, values: torch.Tensor, matrix: tuple[int, int]) -> Made:
    """Return a tensor that is the same whatever the values of the matrix are."""
    flat = values.reshape(1, -1)
    return Made(
        suffix,
        str(values.dtype).removeprefix("torch."),
        tuple(values.shape),
        (1, flat.shape[1]),
        matrix,
        lambda read, top, bottom, left, right: flat[top:bottom, left:right],
    )

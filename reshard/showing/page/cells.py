"""A parameter as a rectangle, cut as the ranks hold it. Geometry only: no markup."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod, sqrt
from typing import Any

__all__ = ["Cell", "Picture", "picture_of"]

_MOST = 4096  # cells of one picture
_LEAST, _LONGEST, _STRIP, _PER_CUT = 16.0, 200.0, 12.0, 12.0  # lengths of sides, in pixels
_LINES_APART = 5.0  # the least distance between lines of heads or blocks that is still seen as lines


@dataclass(frozen=True, slots=True)
class Cell:
    """A part of a parameter that the same ranks hold, in pixels. No `ranks`: nobody does."""

    x: float
    y: float
    width: float
    height: float
    ranks: tuple[int, ...]

    @property
    def label(self) -> str:
        """The ranks, if the cell has room to write them."""
        text = ", ".join(map(str, self.ranks))
        return text if self.width >= 5 * len(text) + 1 and self.height >= 10 else ""


@dataclass(frozen=True, slots=True)
class Picture:
    """A parameter's rectangle in pixels. `rows` and `columns` are lines at heads or at blocks of quantized values.

    `dims` are the tensor's dims that run downwards and to the right; None if it has no such dim. `whole` says whether
    all ranks hold all of it. If it is not `drawn`, it is cut into more boxes than can be seen, and has no cells.
    """

    width: float
    height: float
    cells: tuple[Cell, ...]
    rows: tuple[float, ...]
    columns: tuple[float, ...]
    dims: tuple[int | None, int | None]
    whole: bool
    drawn: bool = True


@dataclass(frozen=True, slots=True)
class _Axis:
    """A side of the rectangle: `marks` are the bounds of all parts along it, in elements of `dim`."""

    dim: int | None
    marks: tuple[int, ...]
    length: float

    def steps(self) -> Iterator[tuple[dict[int, int], float, float]]:
        """Yield each part along the axis: its first element by dim, and its bounds in pixels."""
        scale = self.length / (self.marks[-1] or 1)
        for low, high in zip(self.marks, self.marks[1:]):
            yield {} if self.dim is None else {self.dim: low}, low * scale, high * scale


def picture_of(row: Mapping[str, Any]) -> Picture:
    """Draw a row of a report. The first dim runs downwards, the first other one that is cut to the right; a vector
    runs to the right. Sides grow with the root of their sizes, and give every part room to be seen.
    """
    shape, world_size = row["shape"], len(row["rank_bytes"])
    parts = _parts(row, world_size)
    boxes = [box for held in parts for box in held]
    cut = {dim for box in boxes for dim, (start, stop) in box.items() if (start, stop) != (0, shape[dim])}
    down, right = (_axis(shape, dim, boxes) for dim in _dims(shape, cut))
    dims = down.dim, right.dim
    if (len(down.marks) - 1) * (len(right.marks) - 1) > _MOST or not cut <= set(dims):
        return Picture(_LONGEST, _LONGEST, (), (), (), dims, whole=False, drawn=False)
    cells = []
    for at_row, top, bottom in down.steps():
        across = [(rank, held) for rank, of in enumerate(parts) if (held := [box for box in of if _holds(box, at_row)])]
        for at_column, left, end in right.steps():
            ranks = tuple(rank for rank, held in across if any(_holds(box, at_column) for box in held))
            cells.append(Cell(_round(left), _round(top), _round(end - left), _round(bottom - top), ranks))
    return Picture(
        _round(right.length),
        _round(down.length),
        tuple(cells),
        _lines(row, down),
        _lines(row, right),
        dims,
        whole=all(len(cell.ranks) == world_size for cell in cells),
    )


def _axis(shape: Sequence[int], dim: int | None, boxes: Iterable[Mapping[int, Sequence[int]]]) -> _Axis:
    """Return an axis. That of experts is as long as the rows of all of them."""
    if dim is None:
        return _Axis(None, (0, 1), _STRIP)
    marks = tuple(sorted({0, shape[dim], *(at for box in boxes for at in box.get(dim, ()))}))
    size = prod(shape[:2]) if dim == 0 and len(shape) == 3 else shape[dim]
    least = _LEAST if len(marks) < 3 else min(_LONGEST, max(_LEAST, _PER_CUT * (len(marks) - 1)))
    return _Axis(dim, marks, max(least, min(_LONGEST, 1.15 * sqrt(size))))


def _parts(row: Mapping[str, Any], world_size: int) -> list[list[dict[int, Sequence[int]]]]:
    """Return the boxes of every rank: (start, stop) by dim, where it does not hold all along a dim."""
    if "boxes" in row:
        return [[dict(enumerate(box)) for box in held] for held in row["boxes"]]
    found: list[list[dict[int, Sequence[int]]]] = [[{}] for _ in range(world_size)]
    for cut in row["cuts"]:
        for rank, ranges in enumerate(cut["ranges"]):
            found[rank] = [{**box, cut["dim"]: one} for box in found[rank] for one in ranges]
    return found


def _holds(box: Mapping[int, Sequence[int]], at: Mapping[int, int]) -> bool:
    return all(box[dim][0] <= place < box[dim][1] for dim, place in at.items() if dim in box)


def _dims(shape: Sequence[int], cut: set[int]) -> tuple[int | None, int | None]:
    if len(shape) < 2:
        return None, 0 if shape else None
    return 0, min((dim for dim in cut if dim), default=1)


def _lines(row: Mapping[str, Any], axis: _Axis) -> tuple[float, ...]:
    """Return where heads end along a cut dim, or quantized blocks, if these lines can be told apart."""
    if axis.dim is None:
        return ()
    size, unit = row["shape"][axis.dim], 0.0
    if "heads" in row and any(cut["dim"] == axis.dim for cut in row.get("cuts", ())):
        unit = size / row["heads"]
    elif "quantized" in row and row["quantized"]["unit"][axis.dim] > 1:
        unit = row["quantized"]["unit"][axis.dim]
    if not 0 < unit < size or unit * axis.length / size < _LINES_APART:
        return ()
    return tuple(_round(number * unit * axis.length / size) for number in range(1, ceil(size / unit)))


def _round(length: float) -> float:
    """Return a length to a tenth of a pixel: texts stay short, and the same on every machine."""
    return round(length, 1)

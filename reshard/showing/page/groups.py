"""Parameters in the order of the model: layers that look alike are one group, whose parameters stand by kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...text import numbers_in_runs
from ..loads import KINDS, is_replicated
from .cells import Picture, picture_of

__all__ = ["Figure", "Group", "groups_of", "short_name"]

_MOST = 12_000  # cells of all pictures; what is left is in the table


@dataclass(frozen=True, slots=True)
class Figure:
    """A parameter's picture. `row` is its number in the report's list, `name` what follows the layer's name."""

    row: int
    name: str
    picture: Picture


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that look alike, or parameters outside of layers. `blocks` are their figures by kind: its name, whether
    all of them are replicated, and the figures.

    Without `blocks`, there was no room left to draw them.
    """

    title: str
    layers: int
    parameters: int
    blocks: tuple[tuple[str, bool, tuple[Figure, ...]], ...]


def groups_of(report: Mapping[str, Any]) -> tuple[Group, ...]:
    """Group the rows of a report, and draw them as long as there is room."""
    rows, room = report["parameters"], _MOST
    found = []
    for title, layers, numbers in _alike(rows):
        pictures = {number: picture_of(rows[number]) for number in numbers} if room > 0 else {}
        room -= sum(len(picture.cells) for picture in pictures.values())
        figures = [Figure(number, _short(rows[number]), picture) for number, picture in pictures.items()]
        found.append(Group(title, layers, len(numbers), tuple(_by_kind(rows, figures)) if room >= 0 else ()))
    return tuple(found)


def short_name(name: str) -> str:
    """Return what follows the name of the layer, or all of a name outside of layers."""
    return name.partition(".*.")[2] or name


def _short(row: Mapping[str, Any]) -> str:
    return short_name(row["parameter"])


def _by_kind(
    rows: Sequence[Mapping[str, Any]], figures: Sequence[Figure]
) -> Iterator[tuple[str, bool, tuple[Figure, ...]]]:
    """Yield the figures of each kind, and whether all are replicated. Vectors come last, since they are small."""
    for kind, name in KINDS.items():
        of = [figure for figure in figures if rows[figure.row]["kind"] == kind]
        if of:
            whole = all(is_replicated(rows[figure.row]) for figure in of)
            yield name, whole, tuple(sorted(of, key=lambda figure: len(rows[figure.row]["shape"]) < 2))


def _alike(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int, list[int]]]:
    """Yield a title, the number of layers, and the numbers of the rows in each of them, in the order of the model."""
    stacks: dict[str, list[int]] = {}  # by the name before the number; what has none stands in runs
    order: list[tuple[str | None, list[int]]] = []
    for number, row in enumerate(rows):
        before, layered, _ = row["parameter"].partition(".*")
        if not layered:
            if not order or order[-1][0] is not None:
                order.append((None, []))
            order[-1][1].append(number)
        elif before in stacks:
            stacks[before].append(number)
        else:
            stacks[before] = [number]
            order.append((before, stacks[before]))
    at = [stack is not None for stack, _ in order]
    for place, (stack, numbers) in enumerate(order):
        if stack is None:
            where = [words for words, there in (("after", at[:place]), ("before", at[place:])) if any(there)]
            yield (
                {0: "no layers", 1: f"{where[0]} the layers" if where else "", 2: "between layers"}[len(where)],
                1,
                numbers,
            )
            continue
        inside: dict[int, list[int]] = {}
        for number in numbers:
            for first, last in rows[number]["layers"]:
                for layer in range(first, last + 1):
                    inside.setdefault(layer, []).append(number)
        kinds: dict[tuple[int, ...], list[int]] = {}
        for layer, held in sorted(inside.items()):
            kinds.setdefault(tuple(held), []).append(layer)
        for alike, layers in kinds.items():
            yield f"{stack}.{numbers_in_runs(layers)}", len(layers), list(alike)

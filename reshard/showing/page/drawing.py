"""The picture of a resharded folder for its model card: one SVG file without scripts or links."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...sharding.topology import Topology
from ..loads import rank_loads
from ..tables import gigabytes, middle_out
from .cells import Picture
from .groups import Group, groups_of
from .page import bars_of, environment, rank_colours, stylesheet

__all__ = ["SVG_MARK", "card_drawing"]

SVG_MARK = "<!-- Drawn by reshard publish. -->"  # a file with it is ours, and may be replaced
_WIDTH, _EDGE, _GAP, _CHARACTER = 880.0, 16.0, 14.0, 5.7  # pixels; a caption's characters are as wide
_WIDEST = 150.0  # of a caption
_CAPTION, _HEADING = 26.0, 30.0  # heights


@dataclass(frozen=True, slots=True)
class _Placed:
    """A figure with its place in the drawing: of its picture's upper left corner."""

    x: float
    y: float
    picture: Picture
    name: str
    shape: str


@dataclass(frozen=True, slots=True)
class _Section:
    """A group's title with its place, and its figures."""

    y: float
    title: str
    figures: tuple[_Placed, ...]
    note: str


def card_drawing(report: Mapping[str, Any]) -> str:
    """Return the SVG of a report: a bar for each rank, and the layers. The same report gives the same text."""
    loads = rank_loads(report)
    tall = 14.0 if len(loads) <= 16 else 7.0
    bars = bars_of(report, loads, 560.0)
    top = 76.0 + tall * len(loads)
    sections, bottom = _sections(report, top + 34)
    style = f"{stylesheet()}{rank_colours(len(loads))}"
    return (
        environment()
        .get_template("card.svg")
        .render(
            mark=SVG_MARK,
            width=_WIDTH,
            height=bottom,
            title=f"{report['architecture']} for {Topology(**report['mesh'])}",
            bars=bars,
            tall=tall,
            legend=list(_legend(bars["legend"])),
            legend_y=top + 6,
            sections=sections,
            style=style,
        )
    )


def _legend(kinds: list[tuple[str, str, int]]) -> Iterator[tuple[float, str, str]]:
    at = _EDGE
    for kind, name, size in kinds:
        words = f"{name} {gigabytes(size)}"
        yield at, kind, words
        at += 20 + 6.6 * len(words) + 14


def _sections(report: Mapping[str, Any], top: float) -> tuple[list[_Section], float]:
    """Place the figures of all groups in lines, and return them with the height of the drawing."""
    found, y = [], top
    for group in groups_of(report):
        figures, below = _flow(report, group, y + _HEADING)
        title = group.title + (f" · {group.layers} layers alike" if group.layers > 1 else "")
        note = "" if figures else f"{group.parameters} parameters, not drawn"
        found.append(_Section(round(y + 18, 1), title, tuple(figures), note))
        y = below
    return found, round(y + _EDGE, 1)


def _flow(report: Mapping[str, Any], group: Group, y: float) -> tuple[list[_Placed], float]:
    """Place a group's figures from left to right, in lines whose pictures stand on one line."""
    lines: list[list[tuple[float, Picture, str, str]]] = [[]]
    x = _EDGE
    for _, _, figures in group.blocks:
        for figure in figures:
            row = report["parameters"][figure.row]
            shape = " × ".join(map(str, row["shape"])) or "scalar"
            room = max(figure.picture.width, min(_WIDEST, _CHARACTER * max(len(figure.name), len(shape))))
            name = middle_out(figure.name, int(room / _CHARACTER))
            if lines[-1] and x + room > _WIDTH - _EDGE:
                lines.append([])
                x = _EDGE
            lines[-1].append((x, figure.picture, name, shape))
            x += room + _GAP
    placed = []
    for line in lines:
        height = max((picture.height for _, picture, _, _ in line), default=0.0)
        placed += [
            _Placed(round(at, 1), round(y + height - picture.height, 1), picture, name, shape)
            for at, picture, name, shape in line
        ]
        y += height + _CAPTION + 12
    return placed, y

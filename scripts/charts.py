"""Charts as SVG text: bars in groups, and lines. The same figures give the same bytes; light and dark by the reader's
choice. Needs only the standard library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Panel", "bars", "lines"]

WIDTH, HEIGHT = 880, 400
_EDGE, _LEFT, _TOP, _BOTTOM, _GAP = 16, 58, 104, 52, 30  # pixels around and between the panels
_CHARACTER = 5.9  # pixels, of the legend's text
_ROOM = 1.1  # the axis goes this far over the highest value
_STYLE = """:root{color-scheme:light dark;--back:#fdfdfc;--text:#1c1d21;--soft:#5b5e66;--line:#d9dade}
@media (prefers-color-scheme:dark){:root{--back:#131417;--text:#eceded;--soft:#a3a7b0;--line:#363940}}
text{font:11px ui-sans-serif,system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--text)}
.title{font-size:18px;font-weight:700}.heading{font-size:13px;font-weight:600}.soft{fill:var(--soft)}
.value{font-size:10px;text-anchor:middle}.inside{font-size:10px;fill:#101114}
.middle{text-anchor:middle}.end{text-anchor:end}.grid{stroke:var(--line)}.axis{stroke:var(--soft)}"""


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar, and what is written over it and, if it is tall enough, in it."""

    value: float
    above: str
    inside: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars by group and series. A group may lack a series."""

    title: str
    groups: Mapping[str, Mapping[str, Bar]]


def bars(title: str, note: str, y: str, series: Mapping[str, str], panels: Sequence[Panel]) -> str:
    """Draw panels side by side on one scale. `series` are names with colours, in the order of the bars of a group."""
    highest = max(bar.value for panel in panels for group in panel.groups.values() for bar in group.values())
    scale = _Scale(highest * _ROOM, HEIGHT - _BOTTOM, _TOP + 22)
    room = (WIDTH - _LEFT - _EDGE - _GAP * (len(panels) - 1)) / len(panels)
    parts = [*_frame(title, note, y, series)]
    for number, panel in enumerate(panels):
        left = _LEFT + number * (room + _GAP)
        parts.append(_text(left + room / 2, _TOP + 12, panel.title, "heading middle"))
        parts += _grid(scale, left, left + room, labelled=number == 0)
        share = room / len(panel.groups)
        wide = min(56.0, share * 0.86 / len(series))
        for place, (name, group) in enumerate(panel.groups.items()):
            middle = left + share * (place + 0.5)
            parts.append(_text(middle, HEIGHT - _BOTTOM + 18, name, "middle"))
            for at, (which, colour) in enumerate(series.items()):
                if which in group:
                    parts += _bar(group[which], middle + wide * (at - len(series) / 2), wide, colour, scale)
    return _svg(title, parts)


def lines(
    title: str,
    note: str,
    x: str,
    y: str,
    series: Mapping[str, str],
    points: Mapping[str, Sequence[tuple[float, float]]],
) -> str:
    """Draw lines of (x, y) points, both from zero up. `series` are names with colours."""
    across = _Scale(max(at for line in points.values() for at, _ in line), _LEFT, WIDTH - _EDGE - 40)
    up = _Scale(max(value for line in points.values() for _, value in line) * _ROOM, HEIGHT - _BOTTOM, _TOP)
    parts = [*_frame(title, note, y, series), *_grid(up, _LEFT, WIDTH - _EDGE, labelled=True)]
    parts += [_text(across(tick), HEIGHT - _BOTTOM + 18, f"{tick:g}", "middle") for tick in across.ticks()]
    parts.append(_text((_LEFT + WIDTH) / 2, HEIGHT - 12, x, "soft middle"))
    for name, colour in series.items():
        placed = [(f"{across(at):.1f}", f"{up(value):.1f}") for at, value in points[name]]
        path = " ".join(f"{at},{height}" for at, height in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{at}" cy="{height}" r="3.5" fill="{colour}"/>' for at, height in placed]
        at, value = points[name][-1]
        parts.append(_text(across(at) + 8, up(value) + 4, f"{value:.3g}", ""))
    return _svg(title, parts)


@dataclass(frozen=True, slots=True)
class _Scale:
    """Places numbers from 0 to `most` between two pixels."""

    most: float
    zero: float
    top: float

    def __call__(self, value: float) -> float:
        return self.zero + (self.top - self.zero) * value / self.most

    def ticks(self) -> list[float]:
        """Return at most 7 round numbers from 0 up."""
        power = 10.0 ** math.floor(math.log10(self.most / 6))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if self.most / (power * factor) <= 6)
        return [step * number for number in range(int(self.most / step) + 1)]


def _frame(title: str, note: str, y: str, series: Mapping[str, str]) -> Iterator[str]:
    yield _text(_EDGE, 30, title, "title")
    yield _text(_EDGE, 50, note, "soft")
    at = float(_EDGE)
    for name, colour in series.items():
        yield f'<rect x="{at:.1f}" y="62" width="14" height="11" fill="{colour}"/>'
        yield _text(at + 20, 72, name, "")
        at += 44 + _CHARACTER * len(name)
    yield _text(_EDGE, _TOP - 12, y, "soft")


def _grid(scale: _Scale, left: float, right: float, *, labelled: bool) -> Iterator[str]:
    for tick in scale.ticks():
        height = f"{scale(tick):.1f}"
        kind = "grid" if tick else "axis"
        yield f'<line class="{kind}" x1="{left:.1f}" x2="{right:.1f}" y1="{height}" y2="{height}"/>'
        if labelled:
            yield _text(left - 8, scale(tick) + 4, f"{tick:g}", "soft end")


def _bar(bar: Bar, left: float, wide: float, colour: str, scale: _Scale) -> Iterator[str]:
    top = scale(bar.value)
    tall = scale.zero - top
    yield f'<rect x="{left + 1:.1f}" y="{top:.1f}" width="{wide - 2:.1f}" height="{tall:.1f}" fill="{colour}"/>'
    yield _text(left + wide / 2, top - 4, bar.above, "value")
    if bar.inside and tall > 8 + 6 * len(bar.inside):
        x, y = left + wide / 2 + 3.5, scale.zero - 6
        turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"'
        yield f'<text class="inside" x="{x:.1f}" y="{y:.1f}"{turned}>{escape(bar.inside)}</text>'


def _text(x: float, y: float, words: str, kind: str) -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def _svg(title: str, parts: Sequence[str]) -> str:
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="title">',
            f'<title id="title">{escape(title)}</title>',
            f"<style>{_STYLE}</style>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="var(--back)"/>',
            *parts,
            "</svg>\n",
        ]
    )

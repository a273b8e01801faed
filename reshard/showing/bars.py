"""A bar for each rank, as text: its bytes by kind of parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from ..text import numbers_in_runs
from .loads import KINDS, RankLoad, rank_loads
from .tables import gigabytes

__all__ = ["bars_text"]

_BLOCKS = dict(zip(KINDS, "█▓▒░·╱"))
_ASCII = dict(zip(KINDS, "#=+-./"))
_LONGEST, _SHORTEST = 60, 10  # characters of the longest bar
_MOST = 16  # lines of bars


def bars_text(report: Mapping[str, Any], width: int | None = None, *, blocks: bool = True) -> list[str]:
    """Draw a bar for each rank, in lines of at most `width` characters. Ranks that hold the same share a line.

    Bars have block characters, or signs of ASCII if not `blocks`. Return no lines for a single rank.
    """
    loads = rank_loads(report)
    most = max((load.weights for load in loads), default=0)
    if len(loads) < 2 or not most:
        return []
    signs = _BLOCKS if blocks else _ASCII
    alike: dict[tuple, list[RankLoad]] = {}
    for load in loads:
        alike.setdefault((tuple(load.kinds.values()), load.cache), []).append(load)
    shown = list(alike.values())[:_MOST]
    names = [f"rank{'s' if len(of) > 1 else ''} {numbers_in_runs(load.rank for load in of)}" for of in shown]
    sizes = [gigabytes(of[0].weights) + _beside(of[0]) for of in shown]
    left, right = max(map(len, names)), max(map(len, sizes))
    room = _LONGEST if width is None else min(_LONGEST, width - left - right - 4)
    if room >= _SHORTEST:
        bars = [f"{_bar(of[0], most, room, signs):{room}}" for of in shown]
        lines = [f"{name:{left}}  {bar}  {size}" for name, bar, size in zip(names, bars, sizes)]
    elif left + 2 + right <= (width or 0):
        lines = [f"{name:{left}}  {size}" for name, size in zip(names, sizes)]
    else:  # a number that is cut is another number
        lines = [
            line
            for name, size in zip(names, sizes)
            for line in (name, *f"  {size}".replace(" + ", "\n  + ").split("\n"))
        ]
    if len(alike) > _MOST:
        lines.append(f"… and {len(loads) - sum(map(len, shown))} more ranks")
    fullest = max(loads, key=lambda load: load.weights)
    legend = [f"{signs[kind]} {KINDS[kind]} {gigabytes(size)}" for kind, size in fullest.kinds.items() if size]
    lines += _wrapped(legend, width)
    return lines if blocks else [line.replace("–", "-").replace("…", ".") for line in lines]


def _beside(load: RankLoad) -> str:
    return f" + {gigabytes(load.cache)} of KV cache" if load.cache else ""


def _bar(load: RankLoad, most: int, room: int, signs: Mapping[str, str]) -> str:
    """Write a bar of `room` characters for `most` bytes: every bound is rounded, so the sum is."""
    bounds = [0, *(round(room * size / most) for size in accumulate(load.kinds.values()))]
    return "".join(signs[kind] * (stop - start) for kind, start, stop in zip(load.kinds, bounds, bounds[1:]))


def _wrapped(words: Sequence[str], width: int | None) -> list[str]:
    lines: list[str] = []
    for word in words:
        if lines and (width is None or len(lines[-1]) + len(word) + 3 <= width):
            lines[-1] += f"   {word}"
        else:
            lines.append(word)
    return lines

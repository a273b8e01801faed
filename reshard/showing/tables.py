"""Tables and sizes as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..text import printable

__all__ = ["gigabytes", "middle_out", "table"]


def gigabytes(size: int) -> str:
    """Write bytes in the unit that keeps them short: 1000-based, as disks are sold."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def table(lines: Sequence[Sequence[Any]], *, width: int | None = None, shorten: Sequence[tuple[int, int]] = ()) -> str:
    """Align columns to the left; a column with no cell filled is left out.

    If the table is wider than `width` characters, cells lose their middle: first those of the columns that `shorten`
    names, in that order, each down to the number of characters given there, and then the widest.
    """
    cells = [[("" if cell is None else printable(cell)) for cell in line] for line in lines]
    kept = [i for i in range(len(cells[0])) if any(line[i] for line in cells[1:])]
    widths = {i: max(len(line[i]) for line in cells) for i in kept}
    gap = "  "
    if width is not None:
        over = sum(widths.values()) + len(gap) * len(kept) - width
        for column, least in shorten:
            if column in widths:
                taken = max(0, min(over, widths[column] - least))
                widths[column] -= taken
                over -= taken
        while over > 0 and max(widths.values()) > 1:
            widths[max(widths, key=widths.__getitem__)] -= 1
            over -= 1
    return "\n".join(
        (gap + gap.join(middle_out(line[i], widths[i]).ljust(widths[i]) for i in kept)).rstrip() for line in cells
    )


def middle_out(text: str, width: int) -> str:
    """Shorten `text` to `width` characters. Its end says more than its beginning: q_proj.weight."""
    if len(text) <= width:
        return text
    end = 2 * (width - 1) // 3
    return f"{text[: width - 1 - end]}…{text[len(text) - end :] if end else ''}"

"""Charts as image files. They need matplotlib: the extra `[bench]`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import UsageError
from ...text import printable

__all__ = ["check_chart", "draw"]

_KINDS = (".png", ".svg", ".pdf")


def check_chart(path: str) -> None:
    """Raise UsageError if no chart can be drawn into `path`: call it before hours of measuring."""
    if Path(path).suffix not in _KINDS:
        raise UsageError(f"{printable(path)}: charts are drawn as {', '.join(_KINDS)}")
    if not Path(path).absolute().parent.is_dir():
        raise UsageError(f"{printable(path)}: no such folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("charts are drawn by matplotlib, which is not installed", hint="pip install 'reshard[bench]'")


def draw(
    path: str,
    title: str,
    x: str,
    y: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    ticks: Sequence[float] | None = None,
) -> None:
    """Draw lines of (x, y) points, from zero up. With `ticks`, the x axis has only those values, evenly spaced."""
    check_chart(path)
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, points in lines.items():
        places = [(ticks.index(at) if ticks else at, value) for at, value in points]
        axes.plot(*zip(*places), marker="o", label=name)
    axes.set(title=title, xlabel=x, ylabel=y, ylim=(0, None))
    if ticks:
        axes.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
    else:
        axes.set_xlim(0, None)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)
    pyplot.close(figure)

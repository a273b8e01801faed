"""Remarks and progress on stderr while a command works; nothing with `--quiet`."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

import click

from ..launch.switches import is_quiet
from ..process import Advance, silent
from ..text import printable

__all__ = ["progress_bar", "say"]

_REMARK = 1000  # characters shown of a remark
_EVERY = 30.0  # seconds between two lines of progress, if there is no terminal


def say(text: str) -> None:
    """Print a remark in one line."""
    if not is_quiet():
        click.echo(printable(text, _REMARK), err=True)


@contextlib.contextmanager
def progress_bar(total: int, what: str) -> Iterator[Advance]:
    """Show progress (see `reshard.process.Progress`): a bar on a terminal, a line every half minute elsewhere."""
    if is_quiet():
        shown = silent(total, what)
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        shown = _bar(total, what)
    else:
        shown = _lines(total, what)
    with shown as report:
        yield report


@contextlib.contextmanager
def _bar(total: int, what: str) -> Iterator[Advance]:
    from tqdm import tqdm

    lock = threading.Lock()
    with tqdm(total=total or None, unit="B", unit_scale=True, desc=what, leave=False, file=sys.stderr) as bar:

        def update(size: int) -> None:
            with lock:
                bar.update(size)

        yield update


@contextlib.contextmanager
def _lines(total: int, what: str) -> Iterator[Advance]:
    """Print nothing if work ends soon. A thread of its own looks at the clock, so a standstill is shown too."""
    lock, ended = threading.Lock(), threading.Event()
    done = 0

    def update(size: int) -> None:
        nonlocal done
        with lock:
            done += size

    def tell() -> None:
        before, at = 0, time.monotonic()
        while not ended.wait(_EVERY):
            now, seen = time.monotonic(), done
            with contextlib.suppress(OSError, ValueError):  # the reader has gone, or stderr is closed
                click.echo(_progress_text(what, seen, total, (seen - before) / (now - at)), err=True)
            before, at = seen, now

    teller = threading.Thread(target=tell, name="reshard-progress", daemon=True)
    teller.start()
    try:
        yield update
    finally:
        ended.set()
        teller.join()


def _progress_text(what: str, done: int, total: int, rate: float) -> str:
    """Return a line of progress; `rate` is in bytes per second."""
    from ..showing.tables import gigabytes  # here, since `--help` needs none of it

    parts = [f"{what}: {gigabytes(done)}"]
    if total:
        parts = [f"{what}: {gigabytes(done)} of {gigabytes(total)} ({min(100, 100 * done // total)}%)"]
    parts.append(f"{gigabytes(int(rate))}/s")
    if total and rate >= 1 and done < total:
        parts.append(f"{duration((total - done) / rate)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Return seconds in the units that a person would use."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"

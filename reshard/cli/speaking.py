"""What a command says on stderr while it works: remarks, and progress; nothing with `--quiet`."""

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

_REMARK = 1000  # characters shown of one
_EVERY = 30.0  # seconds between two lines, where there is no terminal


def say(text: str) -> None:
    """A remark, in a line."""
    if not is_quiet():
        click.echo(printable(text, _REMARK), err=True)


@contextlib.contextmanager
def progress_bar(total: int, what: str) -> Iterator[Advance]:
    """Progress (see `reshard.process.Progress`): a bar on a terminal, a line every half minute elsewhere."""
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
    """Nothing of work that ends soon. What stands still is told too: a thread of its own looks at the clock."""
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
            with contextlib.suppress(OSError, ValueError):  # a reader who has gone; a stderr that is closed
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
    """`rate` in bytes per second."""
    from ..showing.tables import gigabytes  # not before: `--help` needs none of it

    parts = [f"{what}: {gigabytes(done)}"]
    if total:
        parts = [f"{what}: {gigabytes(done)} of {gigabytes(total)} ({min(100, 100 * done // total)}%)"]
    parts.append(f"{gigabytes(int(rate))}/s")
    if total and rate >= 1 and done < total:
        parts.append(f"{duration((total - done) / rate)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds in the units that a person would say."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"

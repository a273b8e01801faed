"""Source files that arrive one after another while those that are here are cut: a few ahead, gone when done with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

__all__ = ["AHEAD", "Arrivals", "Fetch", "in_order"]

AHEAD = 2  # files, the one that is being cut among them

_LOOK_UP = 0.1  # seconds between looks whether the work is given up
_TO_STOP = 3.0  # seconds for what is under way then

Fetch = Callable[[str, Callable[[], bool]], Path]  # of a file, by name, until the work is given up


def in_order(together: Iterable[Collection[str]]) -> dict[str, int]:
    """The files of many pieces of work, by name, each with how many must be here at once when it has come.

    `together` are the files that one piece of work reads; it is done when the last of them has come.
    """
    last: dict[str, str] = {}
    for names in together:
        for name in names:
            last[name] = max(last.get(name, name), *names)
    return {name: sum(first <= name <= end for first, end in last.items()) for name in sorted(last)}


class Arrivals:
    """Files fetched in order, each on a thread of its own, `ahead` of them here or under way at a time.

    A file that is asked for out of its turn is fetched at once, and does not count. `discard` is called with each
    file that everybody is done with. Leaving the context ends it, and what is under way where that
    can be broken off.
    """

    def __init__(self, fetch: Fetch, *, discard: Callable[[Path], object], ahead: int = AHEAD) -> None:
        self._fetch, self._discard, self._ahead = fetch, discard, ahead
        self._threads: list[threading.Thread] = []
        self._queue: dict[str, int] = {}
        self._urgent: list[str] = []
        self._begun: set[str] = set()  # in order, and not done with
        self._asked: set[str] = set()  # out of order
        self._here: dict[str, Path | BaseException] = {}
        self._stop = False
        self._change = threading.Condition()

    def __enter__(self) -> Arrivals:
        for _ in range(self._ahead):  # while one is checked, the next is on its way
            self._threads.append(threading.Thread(target=self._run, name="reshard-arrivals", daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._stop = True
            self._change.notify_all()
        until = time.monotonic() + _TO_STOP
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def expect(self, needs: Mapping[str, int]) -> None:
        """Fetch these in this order, and no others that nobody has asked for. With each goes how many must be here at
        once when it has come, itself included: so many may be, or everybody would wait."""
        with self._change:
            self._queue = {name: most for name, most in needs.items() if name not in self._begun | self._asked}
            self._change.notify_all()

    def ask(self, name: str) -> None:
        """Fetch a file out of its turn."""
        with self._change:
            self._ask(name)

    def _ask(self, name: str) -> None:
        if name not in self._begun | self._asked:
            self._queue.pop(name, None)
            self._urgent.append(name)
            self._asked.add(name)
            self._change.notify_all()

    def wait(self, name: str, given_up: Callable[[], bool] = lambda: False) -> Path:
        """The file, when it is here. Raises what fetching it raised; InterruptedError once it is `given_up`."""
        with self._change:
            if name not in self._queue:
                self._ask(name)
            while name not in self._here:
                if self._stop or given_up():
                    raise InterruptedError
                self._change.wait(_LOOK_UP)
            found = self._here[name]
        if isinstance(found, BaseException):
            raise found
        return found

    def done(self, name: str) -> None:
        """Nobody needs the file any more."""
        with self._change:
            found = self._here.pop(name, None)
            self._begun.discard(name)
            self._asked.discard(name)
            self._queue.pop(name, None)
            self._change.notify_all()
        if isinstance(found, Path):
            self._discard(found)

    def _next(self) -> str | None:
        """What to fetch now. The lock is held."""
        if self._urgent:
            return self._urgent.pop(0)
        for name, most in self._queue.items():
            if len(self._begun) >= max(self._ahead, most):
                return None
            del self._queue[name]
            self._begun.add(name)
            return name
        return None

    def _run(self) -> None:
        while True:
            with self._change:
                while (name := self._next()) is None and not self._stop:
                    self._change.wait()
                if self._stop or name is None:
                    return
            found: Path | BaseException
            try:
                found = self._fetch(name, lambda: self._stop)
            except BaseException as error:
                found = error
            with self._change:
                self._here[name] = found
                self._change.notify_all()

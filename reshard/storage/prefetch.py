"""Source files that arrive while those that are here are cut: a few ahead, each removed when it is done with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

__all__ = ["AHEAD", "Arrivals", "Fetch", "in_order"]

AHEAD = 2  # files, including the one that is being cut

_LOOK_UP = 0.1  # seconds between checks whether the work is given up
_TO_STOP = 3.0  # seconds that fetches under way get to stop then

Fetch = Callable[[str, Callable[[], bool]], Path]  # fetches a file by name, until its callback says given up


def in_order(together: Iterable[Collection[str]]) -> dict[str, int]:
    """Return the files by name, in order, each with how many must be here at once when it has come.

    `together` are the files that one piece of work reads; it is done when the last of them has come.
    """
    last: dict[str, str] = {}
    for names in together:
        for name in names:
            last[name] = max(last.get(name, name), *names)
    return {name: sum(first <= name <= end for first, end in last.items()) for name in sorted(last)}


class Arrivals:
    """Files fetched in order by `ahead` threads, `ahead` of them here or under way at a time.

    A file that is asked for out of its turn is fetched next, and does not count. `discard` is called with each file
    that nobody needs any more. Leaving the context ends the fetching, also what is under way if that can be broken off.
    """

    def __init__(self, fetch: Fetch, *, discard: Callable[[Path], object], ahead: int = AHEAD) -> None:
        self._fetch, self._discard, self._ahead = fetch, discard, ahead
        self._threads: list[threading.Thread] = []
        self._queue: dict[str, int] = {}
        self._urgent: list[str] = []
        self._begun: set[str] = set()  # in their turn, and not done with
        self._asked: set[str] = set()  # out of their turn
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
        """Fetch these files in this order, and no others that nobody has asked for.

        `needs` maps each file to how many must be here at once when it has come, itself included. So many may be here:
        with fewer, everybody would wait.
        """
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
        """Wait for a file and return its path.

        Raises what fetching it raised, or InterruptedError once the work is `given_up`.
        """
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
        """Let go of a file that nobody needs any more."""
        with self._change:
            found = self._here.pop(name, None)
            self._begun.discard(name)
            self._asked.discard(name)
            self._queue.pop(name, None)
            self._change.notify_all()
        if isinstance(found, Path):
            self._discard(found)

    def _next(self) -> str | None:
        """Return the name of the file to fetch now, if any. The caller holds the lock."""
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

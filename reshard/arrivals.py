"""Source files that arrive one after another while those that are here are cut: a few ahead, gone when done with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = ["Arrivals"]


class Arrivals:
    """Files fetched in order on a thread of its own, at most `ahead` of them here at a time.

    Whoever needs a file out of order gets it, so that nobody waits for another: then there are more. `discard` is
    called with each file that everybody is done with. Leaving the context ends it after the file under way.
    """

    def __init__(
        self, fetch: Callable[[str], Path], order: Iterable[str], *, discard: Callable[[Path], object], ahead: int = 2
    ) -> None:
        self._fetch, self._discard, self._ahead = fetch, discard, ahead
        self._queue, self._urgent = list(order), list[str]()
        self._begun: set[str] = set()  # and not done with
        self._here: dict[str, Path | BaseException] = {}
        self._stop = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="reshard-arrivals", daemon=True)

    def __enter__(self) -> Arrivals:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._stop = True
            self._change.notify_all()

    def wait(self, name: str) -> Path:
        """The file, when it is here. Raises what fetching it raised; InterruptedError where the context has ended."""
        with self._change:
            if name not in self._begun:
                self._urgent.append(name)
                self._begun.add(name)
                self._change.notify_all()
            self._change.wait_for(lambda: name in self._here or self._stop)
            if name not in self._here:
                raise InterruptedError
            found = self._here[name]
        if isinstance(found, BaseException):
            raise found
        return found

    def done(self, name: str) -> None:
        """Nobody needs the file any more, or not again for long."""
        with self._change:
            found = self._here.pop(name, None)
            self._begun.discard(name)
            if name in self._queue:
                self._queue.remove(name)
            self._change.notify_all()
        if isinstance(found, Path):
            self._discard(found)

    def _next(self) -> str | None:
        """What to fetch now. The lock is held."""
        if self._urgent:
            return self._urgent.pop(0)
        while self._queue and self._queue[0] in self._begun:
            self._queue.pop(0)
        if self._queue and len(self._begun) < self._ahead:
            self._begun.add(self._queue[0])
            return self._queue.pop(0)
        return None

    def _run(self) -> None:
        while True:
            with self._change:
                name = self._next()
                while name is None and not self._stop:
                    self._change.wait()
                    name = self._next()
                if self._stop or name is None:
                    return
            found: Path | BaseException
            try:
                found = self._fetch(name)
            except BaseException as error:
                found = error
            with self._change:
                self._here[name] = found
                self._change.notify_all()

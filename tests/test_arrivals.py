"""Files that arrive one after another: in order, a few ahead, out of order for those who cannot wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from reshard.arrivals import Arrivals

NAMES = [f"{i}" for i in range(6)]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


class Harbour:
    """Where files arrive at once; it knows which are here, and the most that ever were."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.here: set[str] = set()
        self.most = 0

    def fetch(self, name: str) -> Path:
        self.log.append(name)
        self.here.add(name)
        self.most = max(self.most, len(self.here))
        return Path(name)

    def discard(self, path: Path) -> None:
        self.here.remove(path.name)


def test_in_order_and_at_most_two_here() -> None:
    harbour = Harbour()
    with Arrivals(harbour.fetch, NAMES, discard=harbour.discard) as arrivals:
        until(lambda: harbour.log == NAMES[:2])
        for name in NAMES:
            assert arrivals.wait(name) == Path(name)
            assert arrivals.wait(name) == Path(name)
            arrivals.done(name)
    assert harbour.log == NAMES
    assert harbour.most == 2
    assert not harbour.here


def test_nobody_waits_for_another() -> None:
    """With two here that somebody keeps, a third comes for whoever asks; and one that was not in the order at all."""
    harbour = Harbour()
    with Arrivals(harbour.fetch, NAMES, discard=harbour.discard) as arrivals:
        arrivals.wait("0")
        arrivals.wait("1")
        assert arrivals.wait("4") == Path("4")
        assert arrivals.wait("other") == Path("other")
        assert harbour.log == ["0", "1", "4", "other"]
        for name in ("other", "4", "1", "0"):
            arrivals.done(name)
        until(lambda: harbour.log[4:] == ["2", "3"])


def test_what_is_done_with_is_fetched_again_for_who_asks() -> None:
    harbour = Harbour()
    with Arrivals(harbour.fetch, NAMES[:1], discard=harbour.discard) as arrivals:
        arrivals.wait("0")
        arrivals.done("0")
        assert not harbour.here
        assert arrivals.wait("0") == Path("0")


def test_what_nobody_needs_is_not_fetched() -> None:
    harbour = Harbour()
    with Arrivals(harbour.fetch, NAMES, discard=harbour.discard) as arrivals:
        until(lambda: len(harbour.log) == 2)
        arrivals.done("2")
        arrivals.done("0")
        until(lambda: harbour.log == ["0", "1", "3"])


def test_an_error_is_for_those_who_wait_for_the_file() -> None:
    def fetch(name: str) -> Path:
        if name == "1":
            raise ConnectionError(name)
        return Path(name)

    with Arrivals(fetch, NAMES, discard=lambda _: None) as arrivals:
        arrivals.wait("0")
        with pytest.raises(ConnectionError):
            arrivals.wait("1")
        arrivals.done("1")
        arrivals.done("0")
        assert arrivals.wait("2") == Path("2")


def test_who_waits_is_let_go_at_the_end() -> None:
    begun, never = threading.Event(), threading.Event()

    def fetch(_: str) -> Path:
        begun.set()
        never.wait()
        return Path()

    ended: list[BaseException] = []

    def wait(arrivals: Arrivals) -> None:
        try:
            arrivals.wait("0")
        except InterruptedError as error:
            ended.append(error)

    with Arrivals(fetch, NAMES, discard=lambda _: None) as arrivals:
        waiting = threading.Thread(target=wait, args=(arrivals,))
        waiting.start()
        assert begun.wait(10)
    waiting.join(10)
    never.set()
    assert len(ended) == 1

"""Files that arrive one after another: in order, a few ahead, out of order for waiters that need it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.storage.prefetch import Arrivals, in_order

NAMES = [f"{i}" for i in range(6)]
EACH = dict.fromkeys(NAMES, 1)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


class Harbour:
    """A `fetch` and `discard` without delay; it records the files that are here, and the most at a time."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.here: set[str] = set()
        self.most = 0

    def fetch(self, name: str, given_up: Callable[[], bool]) -> Path:
        self.log.append(name)
        self.here.add(name)
        self.most = max(self.most, len(self.here))
        return Path(name)

    def discard(self, path: Path) -> None:
        self.here.remove(path.name)


def test_in_order_and_at_most_two_here() -> None:
    harbour = Harbour()
    with Arrivals(harbour.fetch, discard=harbour.discard) as arrivals:
        arrivals.expect(EACH)
        until(lambda: harbour.log == NAMES[:2])
        for name in NAMES:
            assert arrivals.wait(name) == Path(name)
            assert arrivals.wait(name) == Path(name)
            arrivals.done(name)
    assert harbour.log == NAMES
    assert harbour.most == 2
    assert not harbour.here


def test_more_at_once_where_they_are_needed_at_once() -> None:
    harbour = Harbour()
    with Arrivals(harbour.fetch, discard=harbour.discard) as arrivals:
        arrivals.expect({**EACH, "3": 4})
        until(lambda: len(harbour.log) == 2)
        arrivals.done("0")
        until(lambda: len(harbour.log) == 4)  # 1, 2 and 3 are here, and none of them is done
        arrivals.done("1")
        time.sleep(0.05)
        assert harbour.log == ["0", "1", "2", "3"]
        arrivals.done("2")
        until(lambda: harbour.log[4:] == ["4"])


def test_one_that_is_not_expected_comes_for_who_asks() -> None:
    harbour = Harbour()
    with Arrivals(harbour.fetch, discard=harbour.discard) as arrivals:
        arrivals.expect(EACH)
        until(lambda: len(harbour.log) == 2)
        arrivals.ask("5")
        arrivals.wait("5")
        arrivals.expect(EACH)
        assert harbour.log == ["0", "1", "5"]
        assert arrivals.wait("other") == Path("other")
        arrivals.done("other")
        for name in NAMES[:5]:
            arrivals.wait(name)
            arrivals.done(name)
        arrivals.wait("5")
        arrivals.done("5")
    assert harbour.log == ["0", "1", "5", "other", "2", "3", "4"]


def test_who_has_given_up_is_let_go() -> None:
    never = threading.Event()

    def fetch(_: str, given_up: Callable[[], bool]) -> Path:
        never.wait()
        return Path()

    with Arrivals(fetch, discard=lambda _: None) as arrivals:
        begun = time.monotonic()
        with pytest.raises(InterruptedError):
            arrivals.wait("0", lambda: time.monotonic() > begun + 0.2)
    never.set()


def test_what_is_done_with_is_fetched_again_for_who_asks() -> None:
    harbour = Harbour()
    with Arrivals(harbour.fetch, discard=harbour.discard) as arrivals:
        arrivals.expect({NAMES[0]: 1})
        arrivals.wait("0")
        arrivals.done("0")
        assert not harbour.here
        assert arrivals.wait("0") == Path("0")


def test_what_nobody_needs_is_not_fetched() -> None:
    harbour = Harbour()
    with Arrivals(harbour.fetch, discard=harbour.discard) as arrivals:
        arrivals.expect(EACH)
        until(lambda: len(harbour.log) == 2)
        arrivals.done("2")
        arrivals.done("0")
        until(lambda: harbour.log == ["0", "1", "3"])


def test_an_error_is_for_those_who_wait_for_the_file() -> None:
    def fetch(name: str, given_up: Callable[[], bool]) -> Path:
        if name == "1":
            raise ConnectionError(name)
        return Path(name)

    with Arrivals(fetch, discard=lambda _: None) as arrivals:
        arrivals.expect(EACH)
        arrivals.wait("0")
        with pytest.raises(ConnectionError):
            arrivals.wait("1")
        arrivals.done("1")
        arrivals.done("0")
        assert arrivals.wait("2") == Path("2")


def test_who_waits_is_let_go_at_the_end() -> None:
    begun, never = threading.Event(), threading.Event()

    def fetch(_: str, given_up: Callable[[], bool]) -> Path:
        begun.set()
        never.wait()
        return Path()

    ended: list[BaseException] = []

    def wait(arrivals: Arrivals) -> None:
        try:
            arrivals.wait("0")
        except InterruptedError as error:
            ended.append(error)

    with Arrivals(fetch, discard=lambda _: None) as arrivals:
        waiting = threading.Thread(target=wait, args=(arrivals,))
        waiting.start()
        assert begun.wait(10)
    waiting.join(10)
    never.set()
    assert len(ended) == 1


def test_how_many_are_needed_at_once() -> None:
    assert in_order([["a"], ["b"], ["c"]]) == {"a": 1, "b": 1, "c": 1}
    assert in_order([["b"], ["a", "b"], ["c", "b"], ["d"]]) == {"a": 1, "b": 2, "c": 2, "d": 1}
    assert in_order([["a", "d"], ["b"], ["c", "d"], ["e"]]) == {"a": 1, "b": 2, "c": 2, "d": 3, "e": 1}


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sets(st.sampled_from(NAMES), min_size=1, max_size=4), min_size=1, max_size=8), st.integers(1, 3))
def test_nobody_waits_for_ever(together: list[set[str]], workers: int) -> None:
    """All pieces of work end, whatever files they need, and no more files are here than necessary."""
    jobs = sorted(together, key=max)
    needs = in_order(jobs)
    uses = Counter(name for job in jobs for name in job)
    harbour, lock, waiting = Harbour(), threading.Lock(), iter(jobs)

    def work() -> None:
        while (job := next_job()) is not None:
            for name in sorted(job):
                arrivals.wait(name)
            for name in job:
                with lock:
                    uses[name] -= 1
                    last = not uses[name]
                if last:
                    arrivals.done(name)

    def next_job() -> set[str] | None:
        with lock:
            return next(waiting, None)

    with Arrivals(harbour.fetch, discard=harbour.discard) as arrivals:
        arrivals.expect(needs)
        threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    assert not harbour.here
    assert sorted(harbour.log) == sorted(needs)
    assert harbour.most <= max(2, *needs.values())

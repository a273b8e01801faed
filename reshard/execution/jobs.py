"""A pool of threads that does jobs: the first failure ends all, and a file is let go when no job needs it any more."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

__all__ = ["Job", "run_jobs"]


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of work: the source files that it reads, in order, and the byte where it begins in the first.

    `done` says whether an earlier run claims to have done it.
    """

    files: tuple[str, ...]
    at: float
    work: Callable[[], None]
    done: bool


def run_jobs(
    jobs: Sequence[Job], workers: int, stop: threading.Event, *, release: Callable[[str], object] = lambda _: None
) -> None:
    """Do every job on a pool; the first failure, or an interrupt, sets `stop` and ends the rest.

    `release` is called with each file when the last job that reads it is done.

    On return no thread is at work, whatever happened, so the files that they write to can be closed. The pool alone
    would not ensure this: if an interrupt comes while it is starting a thread, it does not know that thread, nor wait
    for it.
    """
    waiting = iter(jobs)
    uses = Counter(name for job in jobs for name in job.files)
    lock = threading.Condition()
    at_work = 0

    def drain() -> None:
        nonlocal at_work
        with lock:
            if stop.is_set():
                return
            at_work += 1
        try:
            while not stop.is_set():
                with lock:
                    job = next(waiting, None)
                if job is None:
                    return
                job.work()
                with lock:
                    uses.subtract(job.files)
                    free = [name for name in job.files if not uses[name]]
                for name in free:
                    release(name)
        except BaseException as error:
            if isinstance(error, InterruptedError) and stop.is_set():
                return  # woken from its wait because another job has failed
            stop.set()
            raise
        finally:
            with lock:
                at_work -= 1
                lock.notify_all()

    def wait_for_all() -> None:
        with lock:
            stop.set()  # a thread that has not begun will not
            lock.wait_for(lambda: not at_work)

    workers = max(1, min(workers, len(jobs)))
    with ThreadPoolExecutor(workers, thread_name_prefix="reshard") as pool:
        try:
            for future in [pool.submit(drain) for _ in range(workers)]:
                future.result()
        finally:
            while True:
                try:
                    wait_for_all()
                    break
                except BaseException:  # another interrupt: the first one is under way already
                    continue

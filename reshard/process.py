"""What this process may use, and how it behaves."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Iterator

__all__ = ["end_on_interrupt", "patient_collector", "patient_from_now_on", "worker_count"]


def worker_count(sharers: int = 1) -> int:
    """Threads used unless told otherwise: the CPUs this process may use, at most 8, shared with that many others."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cpus // sharers))


def end_on_interrupt() -> None:
    """Have Ctrl-C end a rank of torchrun without a word: that is torchrun's to report, and in a collective nobody hears
    it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def patient_from_now_on() -> None:
    """Look for garbage seldom, in a process that ends soon.

    Importing torch and transformers makes a million objects and no garbage, which is looked for in vain at the usual
    thresholds: a quarter of the start.
    """
    gc.set_threshold(200_000, 50, 100)


@contextlib.contextmanager
def patient_collector() -> Iterator[None]:
    """The same for a while, in a process that is another's."""
    before = gc.get_threshold()
    patient_from_now_on()
    try:
        yield
    finally:
        gc.set_threshold(*before)

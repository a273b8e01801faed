"""The process at work: the threads it may use, its signals and garbage collection, and the progress it reports."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
from collections.abc import Callable, Iterator

__all__ = [
    "BLOCK_BYTES",
    "Advance",
    "Progress",
    "end_on_interrupt",
    "one_thread_each",
    "patient_collector",
    "patient_from_now_on",
    "quiet_imports",
    "silent",
    "worker_count",
]

BLOCK_BYTES = 4 << 20  # memory that each thread works in


def worker_count(sharers: int = 1) -> int:
    """Return the default number of threads: the CPUs this process may use, at most 8, divided by `sharers`."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cpus // sharers))


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Have torch compute on the thread that calls it alone, and on those that begin inside the context.

    Threads of ours share the work already; and how torch splits a sum among its threads decides its last bit.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def end_on_interrupt() -> None:
    """Have Ctrl-C end a rank of torchrun silently: torchrun reports it, and Python cannot handle it in a collective."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def quiet_imports() -> None:
    """Silence what torchao tells of itself, if it is installed, whenever transformers imports it: several lines."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def patient_from_now_on() -> None:
    """Look for garbage seldom, in a process that ends soon.

    Importing torch and transformers makes a million objects and no garbage. At the usual thresholds, looking for it in
    vain takes a quarter of the start.
    """
    gc.set_threshold(200_000, 50, 100)


@contextlib.contextmanager
def patient_collector() -> Iterator[None]:
    """Look for garbage seldom inside the context, in a process that is somebody else's."""
    before = gc.get_threshold()
    patient_from_now_on()
    try:
        yield
    finally:
        gc.set_threshold(*before)


Advance = Callable[[int], object]
"""Called with the bytes just done, from any thread."""

Progress = Callable[[int, str], contextlib.AbstractContextManager[Advance]]
"""Progress of long work, as public functions report it: `progress(total, what)` returns a context manager.

It is called once for each part of the work, with the bytes to come and a word for what is done with them ("writing",
"checking", "sending"; "measuring" and "digesting" where weights are quantized). The value of the context manager is an
`Advance`. A total of 0 means not known yet. With tqdm:

    @contextlib.contextmanager
    def progress(total, what):
        with tqdm(total=total, unit="B", unit_scale=True, desc=what) as bar:
            yield bar.update
"""


@contextlib.contextmanager
def silent(_: int, __: str) -> Iterator[Advance]:
    """Report nothing: a `Progress`."""
    yield lambda _: None

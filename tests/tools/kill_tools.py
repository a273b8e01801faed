"""Conversions that end at any of their system calls, as by kill -9, with a count of calls and bytes written.

Jobs run in a fork server that has the libraries imported, so that a sweep over hundreds of calls takes seconds.
"""

from __future__ import annotations

import builtins
import contextlib
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from reshard.execution.journal import Journal

__all__ = ["KILLED", "Job", "convert_until", "interrupt_after", "interrupted_after", "server", "until"]

KILLED = 77
_CALLS = ("pwrite", "write", "open", "fsync", "ftruncate", "posix_fallocate", "mkdir", "unlink", "replace", "rename")


def interrupt_after(monkeypatch: pytest.MonkeyPatch, claims: int) -> None:
    """Raise Ctrl-C in this process, once the journal has that many claims."""
    real, count = Journal.add, itertools.count(1)

    def add(self: Journal, *arguments: str) -> None:
        real(self, *arguments)
        if next(count) == claims:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", add)


@contextlib.contextmanager
def interrupted_after(claims: int) -> Iterator[None]:
    """Expect Ctrl-C, raised once the journal has that many claims."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, claims)
        with pytest.raises(KeyboardInterrupt):
            yield


def server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["kill_tools", "reshard.operations.convert.part", "transformers.models.llama.modeling_llama", "s3fs"]
    )
    return context


@dataclass(frozen=True)
class Job:
    """Convert `source` into `out`, or make a part of that; finish `out` if there is no source.

    `environment` are variables of the process that does it.
    """

    source: str | None
    out: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self) -> None:
        from reshard.operations.convert.convert import convert
        from reshard.operations.convert.finish import finish
        from reshard.operations.convert.part import convert_part

        os.environ.update(self.environment)
        if self.source is None:
            finish(self.out, workers=1)
        else:
            (convert_part if "part" in self.options else convert)(self.source, self.out, workers=1, **self.options)


def convert_until(
    context: Any, source: Path, out: Path, *, call: int | None = None, after: bool = False, **options: Any
) -> Any:
    """Convert for 2 ranks, as `until` does."""
    return until(context, Job(str(source), str(out), {"tp_size": 2, **options}), call=call, after=after)


def until(context: Any, job: Job, *, call: int | None = None, after: bool = False, seconds: float | None = None) -> Any:
    """Do a job in another process, which ends at the `call`-th call, before it is made or `after`; or after `seconds`.

    Returns (exit code, calls made, bytes of tensor data written); the last two are None if the process was killed. The
    exit code of an error is its own.
    """
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, job, call, after, seconds))
    process.start()
    sender.close()
    try:
        calls, written = receiver.recv()
    except EOFError:
        calls = written = None
    process.join(60)
    return process.exitcode, calls, written


def _run(sender: Any, job: Job, call: int | None, after: bool, seconds: float | None) -> None:
    import torch

    import reshard.execution.destination
    import reshard.execution.executor

    torch.set_num_threads(1)
    lock = threading.Lock()
    made = 0
    written = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def once(*arguments: Any, **options: Any) -> Any:
            nonlocal made
            with lock:  # the thread that reads ahead makes calls too
                made += 1
                mine = made
            if mine == call and not after:
                os._exit(KILLED)
            try:
                return real(*arguments, **options)
            finally:  # a failing call counts too
                if mine == call:
                    os._exit(KILLED)

        return once

    def progress(size: int) -> None:
        nonlocal written
        written += size

    real_pwrite = reshard.execution.executor.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> None:
        progress(len(data))
        real_pwrite(fd, data, offset)

    reshard.execution.executor.pwrite = pwrite
    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = counted(builtins.open)
    reshard.execution.destination.move = counted(reshard.execution.destination.move)
    if seconds is not None:
        threading.Timer(seconds, os._exit, [KILLED]).start()
    try:
        job()
    except reshard.errors.ReshardError as error:
        os._exit(error.exit_code)
    sender.send((made, written))
    sender.close()
    os._exit(0)

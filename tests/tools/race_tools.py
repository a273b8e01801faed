"""Two processes that write to the same destination at the same time.

A fork server with the libraries imported starts them. They plan once, and pause at random between their calls.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import multiprocessing
import os
import random
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from disk_calls import Call, already_planned, passing

import reshard
import reshard.storage.disk
from reshard.errors import ReshardError
from reshard.planning.plan import ReshardPlan

__all__ = ["LOCKS", "Work", "racers"]

LOCKS = ("held", "ignored", "ENOLCK", "EOPNOTSUPP", "no renameat2")


@dataclass(frozen=True)
class Work:
    """Convert `source` for that many ranks, or make a `part` of that; or merge it (None), or finish what is made of it
    (0)."""

    source: Path
    ranks: int | None
    overwrite: bool = False
    part: str | None = None

    def __call__(self, out: Path) -> None:
        if self.ranks is None:
            reshard.merge(self.source, out, workers=2)
        elif self.ranks == 0:
            reshard.finish(out, workers=2)
        elif self.part is not None:
            reshard.convert_part(self.source, out, part=self.part, tp_size=self.ranks, workers=2)
        else:
            reshard.convert(self.source, out, tp_size=self.ranks, workers=2, overwrite=self.overwrite)

    def planned(self) -> AbstractContextManager[None]:
        return already_planned(_plan(self)) if self.ranks else nullcontext()


@functools.cache
def _plan(work: Work) -> ReshardPlan:
    return reshard.plan(work.source, tp_size=work.ranks or 1)


@contextmanager
def racers() -> Iterator[Any]:
    """Give a function `race(works, out, locks, seed)`, which returns (exit code, output) of each of two processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["race_tools", "transformers.models.llama.modeling_llama"])
    barrier = context.Barrier(2)
    pipes = [context.Pipe() for _ in range(2)]
    processes = [context.Process(target=_racer, args=(theirs, barrier), daemon=True) for _, theirs in pipes]
    for process in processes:
        process.start()
    for _, theirs in pipes:
        theirs.close()

    def race(works: tuple[Work, Work], out: Path, locks: str, seed: int) -> list[tuple[int, str]]:
        for number, ((ours, _), work) in enumerate(zip(pipes, works)):
            ours.send((work, out, locks, 2 * seed + number))
        return [ours.recv() for ours, _ in pipes]

    yield race
    for ours, _ in pipes:
        ours.close()
    for process in processes:
        process.join(20)


def _racer(pipe: Any, barrier: Any) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            work, out, locks, seed = pipe.recv()
        except EOFError:
            return
        pipe.send(_end(work, out, locks, random.Random(seed), barrier))


def _end(work: Work, out: Path, locks: str, chance: random.Random, barrier: Any) -> tuple[int, str]:
    pace = chance.choice([0, 0.02, 0.2])

    def dawdle(call: Call) -> Any:
        if chance.random() < pace:
            time.sleep(chance.random() * 0.003)
        return call()

    with _locks(locks), work.planned(), passing(out.parent, dawdle):
        barrier.wait(60)
        time.sleep(chance.choice([0, 0, chance.random() * 0.03]))
        try:
            work(out)
        except ReshardError as error:
            return error.exit_code, error.message
        except BaseException:
            return 1, traceback.format_exc()
    return 0, ""


@contextmanager
def _locks(locks: str) -> Iterator[None]:
    def refuse(*_: object) -> None:
        code = errno.EOPNOTSUPP if locks == "EOPNOTSUPP" else errno.ENOLCK
        raise OSError(code, os.strerror(code))

    with pytest.MonkeyPatch.context() as patch:
        if locks == "ignored":
            patch.setattr(fcntl, "flock", lambda *_: None)
        elif locks != "held":
            patch.setattr(fcntl, "flock", refuse)
        if locks == "no renameat2":
            patch.setattr(reshard.storage.disk, "_renameat2", lambda *_: errno.EINVAL)
        yield

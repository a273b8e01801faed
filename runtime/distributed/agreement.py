"""Agreement of the ranks on failures: through the store they share, by a deadline, without a collective."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from reshard import errors
from reshard.errors import RemoteMovedError, ReshardError, TopologyError
from reshard.files.system import explained
from reshard.text import printable

from .ranks import RankInfo

__all__ = ["Deadline", "UnansweredError", "agree", "first_line", "from_first", "spoken", "words_of"]

_STRAGGLERS = 2.0  # seconds that ranks wait for others after a failure, so that all end with its exit code
_ROLL_CALL = 1.0  # seconds to find out who is silent, if a process group was not ready in time
_LONGEST_PAUSE = 0.05  # seconds
_meetings = itertools.count()
_messages = itertools.count()


@dataclass(frozen=True, slots=True)
class Deadline:
    """The moment when all waiting of one load ends, on this process's monotonic clock."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    def seconds(self) -> float:
        """Return the seconds left; negative if the deadline has passed."""
        return self.at - time.monotonic()

    def left(self) -> timedelta:
        """Return the time left as torch takes it: never zero."""
        return timedelta(seconds=max(0.001, self.seconds()))


ANOTHER_FOLDER: ReshardError = RemoteMovedError(
    "has another version", hint="give all ranks the same folder, or pin a commit of a repo with --revision"
)


class UnansweredError(TopologyError):
    """Waiting for the other ranks has failed. If some are silent, they are at fault."""


def agree(
    store: dist.Store,
    info: RankInfo,
    failure: Exception | None,
    deadline: Deadline,
    *,
    what: str,
    value: str = "",
    differing: ReshardError = ANOTHER_FOLDER,
) -> Deadline:
    """Tell the other ranks how `what` went here, and learn how it went there. Return the earliest of their deadlines.

    `value` must be equal on all ranks, such as the digest of the manifest they read. `differing` is the error if it is
    not: its words follow the number of the rank. All ranks learn of a failure within seconds, even if some are silent.

    Raises:
        ReshardError: the failure of the first rank that had one, the same on every rank. It names the rank, unless all
            failed alike. This rank's own failure is its cause.
        RemoteMovedError: the ranks' values differ; or what `differing` is.
        TopologyError: a rank, which is named, did not answer in time; or the store is gone.
    """
    meeting = dist.PrefixStore(f"reshard/{next(_meetings)}", store)
    words = failure and words_of(failure)
    try:
        meeting.set(str(info.rank), json.dumps({"failure": words, "value": value, "left": deadline.seconds()}))
        if isinstance(failure, UnansweredError):
            deadline = Deadline.after(_ROLL_CALL)
        elif words:
            _judge(meeting, info.rank, words)
        answers = _answers(meeting, info.world_size, deadline)
        verdict = _verdict(meeting, answers, what, differing)
    except RuntimeError as error:  # the store's
        raise failure or TopologyError(
            f"{what}: rank {info.rank} has lost the others, since their store is gone: {first_line(error)}",
            hint="torchrun has ended, or the rank that held the store: what that said comes first",
        ) from None
    if info.attempt is not None and None in answers:
        _continue_siblings()
    if verdict is None:
        return Deadline.after(min(answer["left"] for answer in answers))
    guilty, words = verdict
    common = all(answer and answer["failure"] == words for answer in answers)
    if failure is not None and common:
        raise failure
    prefix = "" if guilty is None or common else f"rank {guilty}: "
    raise spoken(words, prefix) from failure


def _answers(meeting: dist.Store, world_size: int, deadline: Deadline) -> list[Any]:
    """Return each rank's answer; None if it is silent until the deadline, or for a while after another has failed."""
    keys = [str(rank) for rank in range(world_size)]
    pause = 0.001
    failed = False
    while not meeting.check(keys) and deadline.seconds() > 0:  # TCPStore's own wait logs each timeout
        if not failed and meeting.check(["verdict"]):
            failed, deadline = True, min(deadline, Deadline.after(_STRAGGLERS), key=Deadline.seconds)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return [json.loads(meeting.get(key)) if meeting.check([key]) else None for key in keys]


def _verdict(meeting: dist.Store, answers: list[Any], what: str, differing: ReshardError) -> Any:
    """Return [guilty rank or None, words] if something is wrong. The first verdict holds for ranks that come later."""
    found = _complaint(answers, what, differing)
    if found and not meeting.check(["verdict"]):
        _judge(meeting, *found)
    return json.loads(meeting.get("verdict")) if meeting.check(["verdict"]) else None


def _judge(meeting: dist.Store, guilty: int | None, words: list[str | None]) -> None:
    meeting.compare_set("verdict", "", json.dumps([guilty, words]))


def _complaint(answers: list[Any], what: str, differing: ReshardError) -> tuple[int | None, list[str | None]] | None:
    silent = [str(rank) for rank, answer in enumerate(answers) if answer is None]
    if silent:
        message = f"{what}: no answer from rank {', '.join(silent)} in time"
        return None, words_of(TopologyError(message, hint="one that is only slow needs a longer --timeout"))
    for rank, answer in enumerate(answers):
        if answer["failure"]:
            return rank, answer["failure"]
        if answer["value"] != answers[0]["value"]:
            return None, words_of(
                type(differing)(f"{what}: rank {rank} {differing.message} than rank 0", hint=differing.hint)
            )
    return None


def words_of(failure: BaseException) -> list[str | None]:
    """Return a failure as words that another rank can be told: class name, message, hint."""
    failure = explained(failure)
    if isinstance(failure, ReshardError):
        name = next(kind.__name__ for kind in type(failure).__mro__ if hasattr(errors, kind.__name__))
        return [name, failure.message, failure.hint]
    return ["ReshardError", f"unexpected {type(failure).__name__}: {printable(failure)}", None]


def spoken(words: Sequence[Any], prefix: str = "") -> ReshardError:
    """Return the error that another rank told of, with `prefix` before its message."""
    name, message, hint = words
    error: ReshardError = getattr(errors, name)(prefix + message, hint=hint)
    return error


def from_first(store: dist.Store, info: RankInfo, find: Callable[[], Any], *, key: str | None = None) -> Any:
    """Return on every rank what `find` returns on rank 0, or raise what it raises. The others wait without a limit:
    a user at a keyboard is slower than any collective may be.

    The result must fit in JSON. `key` is the message's name in the store. The default is the next number, which is
    right only if all ranks of the job take part.

    Raises TopologyError if rank 0, or the process that holds the store, has gone.
    """
    key = f"reshard/message/{next(_messages) if key is None else key}"
    if info.world_size == 1:
        return find()
    if info.rank == 0:
        try:
            found = find()
        except Exception as error:
            store.set(key, json.dumps({"failure": words_of(error)}))
            raise
        store.set(key, json.dumps({"found": found}))
        return found
    try:
        while not store.check([key]):
            time.sleep(_LONGEST_PAUSE)
        told = json.loads(store.get(key))
    except RuntimeError as error:  # the store's
        raise TopologyError(f"rank {info.rank} has lost rank 0: {first_line(error)}") from None
    if "failure" in told:
        raise spoken(told["failure"])
    return told["found"]


def _continue_siblings() -> None:
    """Continue torchrun's other processes on this machine if they are stopped, so that torchrun can end them.

    torchrun sends SIGTERM to all as soon as one has failed. A stopped process does not receive it, and is killed only
    half a minute later.
    """
    parent = os.getppid()
    with contextlib.suppress(OSError):
        for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            with contextlib.suppress(OSError):
                os.kill(int(pid), signal.SIGCONT)


def first_line(error: Exception) -> str:
    """Return the first line of an error: torch's can go on with a C++ stack."""
    return printable(str(error).partition("\n")[0])

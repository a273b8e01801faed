"""A disk that is full, fails or writes half: one line, exit code 5, nothing at the destination, and a way on."""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cli_tools import RANK_FILES
from disk_calls import CALLS, Call, already_planned, make_folders, passing
from power_loss import Tree, put, taken

import reshard
from reshard.errors import StorageError
from reshard.execution.journal import JOURNAL_NAME

STEP = 7  # step of the sweeps in CI; the slow tests take every call
FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_RETRIED = ("open", "close", "mkdir", "unlink", "rmdir", "rename", "replace", "flock", "renameat2")  # after EINTR


@dataclass
class Fault:
    """Makes call number `at` fail, and with `on` every later one too. 0: none."""

    at: int
    code: int
    on: bool = False
    only: tuple[str, ...] = CALLS
    made: int = 0
    met: Call | None = None
    unsynced: set[int] = field(default_factory=set)

    def __call__(self, call: Call) -> Any:
        self.made += call.name in self.only
        if call.name == "fsync":
            file = os.fstat(call.arguments[0]).st_ino
            assert file not in self.unsynced, f"{call.path}: synced again after that had failed"
        if call.name in self.only and (self.made == self.at or (self.on and self.made > self.at > 0)):
            self.met = self.met or call
            if call.name == "close":
                call()  # the file is closed, whatever error it reports
            if call.name == "fsync":
                self.unsynced.add(file)
            raise OSError(self.code, os.strerror(self.code))
        return call()


@dataclass(frozen=True)
class Job:
    """A command, the files before it, and its expected destination."""

    run: Callable[[Path], object]
    before: Tree
    whole: Tree

    def prepare(self, root: Path) -> Path:
        shutil.rmtree(root, ignore_errors=True)
        put(self.before, root)
        return root / "out"


@pytest.fixture(scope="module")
def jobs(room: Path) -> Iterator[dict[str, Job]]:
    source = make_folders(room)

    def run(out: Path) -> None:
        reshard.convert(source, out, tp_size=2, workers=1)

    def overwrite(out: Path) -> None:
        reshard.convert(source, out, tp_size=2, workers=1, overwrite=True)

    def merge(out: Path) -> None:
        reshard.merge(room / "whole", out, workers=1)

    whole = taken(room / "whole")
    with already_planned(reshard.plan(source, tp_size=2)):
        new = Job(run, {}, whole)
        middle = calls_of(new, room / "half") // 2
        attempt(new, new.prepare(room / "half"), Fault(middle, errno.ENOSPC))
        yield {
            "convert": new,
            "resumed": Job(run, taken(room / "half"), whole),
            "overwrite": Job(overwrite, {"out": taken(room / "other")}, whole),
            "merge": Job(merge, {}, taken(room / "merged")),
        }


def there(out: Path) -> Tree | None:
    return taken(out) if out.exists() else None


def beside(out: Path) -> list[str]:
    """Return the names beside the destination."""
    return sorted(name for name in os.listdir(out.parent) if name != out.name)


def open_files(root: Path) -> list[str]:
    """Return open files below `root`. Mappings of the source last as long as an error's traceback."""
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return [path for link in links if os.path.lexists(link) and (path := os.readlink(link)).startswith(str(root))]


def attempt(job: Job, out: Path, fault: Callable[[Call], Any]) -> StorageError | None:
    """Run with a fault, and assert what every failure guarantees."""
    try:
        with passing(out.parent, fault):
            job.run(out)
        error = None
    except StorageError as refused:
        error = refused
    assert not open_files(out.parent)
    if error is None:
        assert there(out) == job.whole
        return None
    assert "\n" not in error.message
    assert error.message.startswith(str(out.parent))
    kept = [name for name in beside(out) if (out.parent / name / JOURNAL_NAME).exists()]
    assert ("goes on" in (error.hint or "")) == any(name not in job.before for name in kept)
    return error


def again(job: Job, out: Path) -> None:
    """Run the same command on a disk that works."""
    if there(out) != job.whole or "out" in job.before:
        job.run(out)
    assert there(out) == job.whole
    assert [name for name in beside(out) if name != "out.lock"] == []


def calls_of(job: Job, root: Path, only: tuple[str, ...] = CALLS) -> int:
    none = Fault(0, 0, only=only)
    attempt(job, job.prepare(root), none)
    return none.made


def sweep(job: Job, root: Path, code: int, step: int, only: tuple[str, ...] = CALLS) -> Counter[str]:
    """Fail at every `step`-th call. Returns how many calls of each kind failed."""
    failed: Counter[str] = Counter()
    for at in range(1, calls_of(job, root, only) + 1, step):
        out = job.prepare(root)
        fault = Fault(at, code, only=only)
        error = attempt(job, out, fault)
        assert fault.met is not None
        failed[fault.met.name] += 1
        if error is None:  # harmless: a lock that is not removed is free, a journal that is not closed is gone
            again_after = ("renameat2",) if code == errno.EINTR else ()
            assert fault.met.name in ("close", "unlink", *again_after), fault.met
            assert fault.met.path.startswith((f"{out}.lock", f"{out}.part-")), fault.met
        elif "is in place" in error.message:
            assert there(out) == job.whole
            assert "out" in job.before
        else:
            assert there(out) == job.before.get("out"), fault.met
            assert os.strerror(code) in error.message
            harmless = ("open",) if code not in FULL else tuple(set(CALLS) - {"fsync", "close"})
            if fault.met.path.endswith(tuple(RANK_FILES)) and fault.met.name not in harmless:
                assert not [name for name in beside(out) if ".part-" in name], fault.met  # nothing of it is kept
        again(job, out)
    return failed


JOBS = ["convert", "resumed", "overwrite", "merge"]
CODES = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG]


@pytest.mark.fault(5, 6)
@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", JOBS)
def test_any_call_fails(name: str, code: int, jobs: dict[str, Job], room: Path) -> None:
    assert sweep(jobs[name], room / "root", code, STEP).total() > 10


@pytest.mark.fault(5, 6)
@pytest.mark.slow
@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", JOBS)
def test_every_call_fails(name: str, code: int, jobs: dict[str, Job], room: Path) -> None:
    failed = sweep(jobs[name], room / "root", code, 1)
    print(sum(failed.values()), "faults", dict(failed))
    assert {"open", "close", "pwrite", "fsync", "posix_fallocate", "renameat2", "write", "flock", "replace"} <= set(
        failed
    )


@pytest.mark.fault(7)
@pytest.mark.parametrize("name", ["convert", "overwrite"])
def test_interrupted_calls(name: str, jobs: dict[str, Job], room: Path) -> None:
    """Python itself repeats the other calls after EINTR."""
    assert sweep(jobs[name], room / "root", errno.EINTR, STEP - 3, NOT_RETRIED).total() > 5


@pytest.mark.fault(5, 6)
@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.ENOSPC], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", JOBS)
def test_nothing_works_any_more(name: str, code: int, jobs: dict[str, Job], room: Path) -> None:
    """Every call fails from some call on, in the cleanup too."""
    job = jobs[name]
    for at in range(1, calls_of(job, room / "root") + 1, STEP):
        out = job.prepare(room / "root")
        fault = Fault(at, code, on=True)
        refused = None
        try:
            with passing(out.parent, fault):
                job.run(out)
        except StorageError as error:
            refused = error
        if refused is not None:
            # Python's rmtree closes again what it could not close, and reports that error.
            assert os.strerror(code) in refused.message or "is in place" in refused.message
            assert there(out) in (job.before.get("out"), job.whole)  # job.whole: it could not be taken back
        else:
            assert there(out) == job.whole
        again(job, out)


@pytest.mark.fault(7)
@pytest.mark.parametrize("name", JOBS)
def test_short_writes(name: str, jobs: dict[str, Job], room: Path) -> None:
    """Every write takes half of its data, the journal's too."""
    job = jobs[name]

    def half(call: Call) -> Any:
        if call.name in ("write", "pwrite"):
            fd, data, *rest = call.arguments
            return call.real(fd, data[: max(1, len(data) // 2)], *rest)
        return call()

    assert attempt(job, job.prepare(room / "root"), half) is None


@pytest.mark.fault(7)
def test_a_write_that_takes_nothing(jobs: dict[str, Job], room: Path) -> None:
    job = jobs["convert"]
    out = job.prepare(room / "root")
    error = attempt(job, out, lambda call: 0 if call.name == "pwrite" else call())
    assert error is not None
    assert "No space left" in error.message
    again(job, out)


def test_a_journal_that_was_cut_short_claims_what_came_before(
    jobs: dict[str, Job], room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a line, then the disk is full: the lines before it are believed, and later lines are complete."""
    job = jobs["convert"]
    out = job.prepare(room / "root")
    lines = 0

    def full(call: Call) -> Any:
        nonlocal lines
        lines += call.name == "write"
        if call.name == "write" and lines == 9:
            fd, data = call.arguments
            return call.real(fd, data[: len(data) // 2])
        if call.name == "write" and lines == 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call()

    error = attempt(job, out, full)
    assert error is not None
    assert "goes on" in str(error.hint)
    [part] = out.parent.glob("out.part-*")
    assert (part / JOURNAL_NAME).read_bytes().count(b"\n") == 8
    written = 0

    def count(call: Call) -> Any:
        nonlocal written
        written += call.name == "write"
        return call()

    assert attempt(job, out, count) is None
    assert 0 < written < 42 - 8 + 1


def test_a_move_that_is_interrupted_is_made_again(jobs: dict[str, Job], room: Path) -> None:
    job, moves = jobs["convert"], 0

    def interrupted(call: Call) -> Any:
        nonlocal moves
        moves += call.name == "renameat2"
        if call.name == "renameat2" and moves < 3:
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
        return call()

    assert attempt(job, job.prepare(room / "root"), interrupted) is None
    assert moves == 3

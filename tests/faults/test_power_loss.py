"""Power loss: `OUT` is absent or whole whatever the disk kept, and the same command completes it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from disk_calls import already_planned, make_folders
from power_loss import Disk, Step, Sync, Tree, put, record, states, taken

import reshard

OFTEN = 40  # number of states in CI; the slow test takes every one


@dataclass(frozen=True)
class Job:
    """A command, its destination before and after, and every change that it made to the disk."""

    run: Callable[[Path], object]
    before: Tree | None
    whole: Tree
    start: Disk
    steps: list[Step]


@pytest.fixture(scope="module")
def jobs(room: Path) -> Iterator[dict[str, Job]]:
    source = make_folders(room)
    whole, other, merged = (taken(room / name) for name in ("whole", "other", "merged"))

    def convert(out: Path, **options: Any) -> None:
        reshard.convert(source, out, tp_size=2, workers=1, **options)

    def overwrite(out: Path) -> None:
        convert(out, overwrite=True)

    def merge(out: Path) -> None:
        reshard.merge(room / "whole", out, workers=1)

    def job(run: Callable[[Path], object], before: Tree | None, whole: Tree) -> Job:
        root = room / "recorded"
        put({"out": before} if before else {}, root)
        start, steps = record(root, lambda: run(root / "out"))
        assert taken(root / "out") == whole
        shutil.rmtree(root)
        return Job(run, before, whole, start, steps)

    with already_planned(reshard.plan(source, tp_size=2)):
        yield {
            "convert": job(convert, None, whole),
            "overwrite": job(overwrite, other, whole),
            "merge": job(merge, None, merged),
        }


def violations(job: Job, found: Iterable[Tree], room: Path) -> Iterator[str]:
    """Yield what is wrong in any state, or after running the command again there; nothing if all are right."""
    for state in found:
        there = state.get("out")
        if there not in (None if job.before is None else job.before, job.whole):
            yield f"OUT holds {sorted(there or ())}"
            continue
        if there == job.whole and job.before is None:
            continue  # the command would say that OUT exists
        root = room / "state"
        put(state, root)
        try:
            job.run(root / "out")
            if os.listdir(root) != ["out"]:
                yield f"left: {os.listdir(root)}"
            elif taken(root / "out") != job.whole:
                yield "OUT is another when the command is run again"
        except reshard.errors.ReshardError as error:
            yield f"run again: {error}"
        finally:
            shutil.rmtree(root, ignore_errors=True)


def count(job: Job, room: Path, often: int) -> int:
    """Check the states of a job. Returns their number."""
    seen = 0

    def counted() -> Iterator[Tree]:
        nonlocal seen
        for state in states(job.start, job.steps, often=often):
            seen += 1
            yield state

    assert next(violations(job, counted(), room), None) is None
    return seen


@pytest.mark.fault(2)
@pytest.mark.parametrize("name", ["convert", "overwrite", "merge"])
def test_no_state_is_bad(name: str, jobs: dict[str, Job], room: Path) -> None:
    assert count(jobs[name], room, OFTEN) > 100


@pytest.mark.fault(2)
@pytest.mark.slow
def test_no_state_is_bad_of_all(jobs: dict[str, Job], room: Path) -> None:
    seen = {name: count(job, room, 1) for name, job in jobs.items()}
    print(seen, "states")
    assert sum(seen.values()) > 10_000


@pytest.mark.fault(2)
@pytest.mark.parametrize("name", ["convert", "overwrite", "merge"])
def test_done_means_on_disk(name: str, jobs: dict[str, Job]) -> None:
    job = jobs[name]
    after = list(states(job.start, job.steps, first=len(job.steps)))
    assert after
    assert all(state["out"] == job.whole for state in after)


@pytest.mark.fault(2)
@pytest.mark.parametrize("name", ["convert", "overwrite", "merge"])
def test_without_any_one_sync_there_is_a_bad_state(name: str, jobs: dict[str, Job]) -> None:
    """The sync of every file and folder is needed, and the replay notices if one is missing."""
    job = jobs[name]
    syncs = [at for at, step in enumerate(job.steps) if isinstance(step, Sync)]
    assert len(syncs) == len(job.whole) + 2  # each file, the folder, and its parent
    for at in syncs:
        steps = job.steps[:at] + job.steps[at + 1 :]
        assert any(state.get("out") != job.whole for state in states(job.start, steps, first=len(steps))), at


@pytest.mark.fault(2)
def test_what_was_replaced_must_not_be_removed_before_its_place_is_synced(jobs: dict[str, Job], room: Path) -> None:
    job = jobs["overwrite"]
    last = max(at for at, step in enumerate(job.steps) if isinstance(step, Sync))
    steps = [*job.steps[:last], *job.steps[last + 1 :], job.steps[last]]
    found = violations(job, states(job.start, steps, first=last), room)
    assert next(found).startswith("OUT holds")

"""A model of disks after a power failure: recorded calls, and every state that they can have left.

A file's data and size are durable when its fsync has returned, and a folder's entries when that folder's fsync has; a
file's fsync does not make its entry durable. Anything may have become of the rest: a write may be there fully, in part,
as zeros or not at all, in any order; so may a change of entries, unless an earlier change of the same names is missing.
Every file system in use promises more than this.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disk_calls import Call, passing

from reshard.files.digest import digest_of
from reshard.storage.disk import EXCHANGE

__all__ = ["Disk", "Sync", "Tree", "put", "record", "states", "taken"]

Tree = dict[str, Any]  # name → content, or the Tree of a folder


@dataclass(frozen=True)
class Write:
    owner: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Size:
    owner: int
    size: int


@dataclass(frozen=True)
class Entries:
    """Names of a folder that change together: name → its new number (None: no entry)."""

    owner: int
    changed: tuple[tuple[str, int | None], ...]

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.changed}


@dataclass(frozen=True)
class Sync:
    owner: int


Step = Write | Size | Entries | Sync
_FEW, _SAMPLE = 100, 60
LOST, KEPT, FIRST_HALF, LAST_HALF, ZEROS = range(5)


@dataclass
class Disk:
    """The durable state: entries of folders and content of files, by number. The root is folder 0."""

    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    files: dict[int, bytes] = field(default_factory=dict)

    def copy(self) -> Disk:
        return Disk({number: dict(entries) for number, entries in self.folders.items()}, dict(self.files))

    def apply(self, step: Step, fate: int = KEPT) -> None:
        if isinstance(step, Entries):
            for name, number in step.changed if fate == KEPT else ():
                self.folders[step.owner].pop(name, None)
                if number is not None:
                    self.folders[step.owner][name] = number
        elif isinstance(step, Size) and fate == KEPT:
            self.files[step.owner] = self.files.get(step.owner, b"")[: step.size].ljust(step.size, b"\0")
        elif isinstance(step, Write) and fate != LOST:
            half, data, offset = len(step.data) // 2, step.data, step.offset
            before = self.files.get(step.owner, b"").ljust(offset + len(data), b"\0")
            if fate == ZEROS:
                data = b""
            elif fate == FIRST_HALF:
                data = data[:half]
            elif fate == LAST_HALF:
                data, offset = data[half:], offset + half
            self.files[step.owner] = before[:offset] + data + before[offset + len(data) :]

    def tree(self, folder: int = 0) -> Tree:
        return {
            name: self.tree(number) if number in self.folders else self.files.get(number, b"")
            for name, number in sorted(self.folders[folder].items())
        }


class _Recorder:
    """Turns calls into steps. Files and folders get numbers, since names and file descriptors are reused."""

    def __init__(self, root: Path) -> None:
        self.root, self.disk, self.steps, self.open = root, Disk(), [], {}
        self._next = itertools.count(1)
        self._load(root, 0)
        self.start = self.disk.copy()

    def _load(self, folder: Path, number: int) -> None:
        for path in folder.iterdir():
            self.disk.folders[number][path.name] = mine = next(self._next)
            if path.is_dir():
                self.disk.folders[mine] = {}
                self._load(path, mine)
            else:
                self.disk.files[mine] = path.read_bytes()

    def number(self, path: str) -> int:
        number = 0
        for part in Path(path).relative_to(self.root).parts:
            number = self.disk.folders[number][part]
        return number

    def step(self, step: Step) -> None:
        self.steps.append(step)
        self.disk.apply(step)

    def entries(self, path: str, changed: dict[str, int | None]) -> None:
        self.step(Entries(self.number(os.path.dirname(path)), tuple(changed.items())))

    def __call__(self, call: Call) -> Any:
        path, name = call.path, os.path.basename(call.path)
        new = call.name == "open" and not os.path.lexists(path)
        result = call()
        if call.name == "open":
            if new:
                mine = next(self._next)
                self.disk.files[mine] = b""
                self.entries(path, {name: mine})
            self.open[result] = self.number(path)
        elif call.name == "close":
            self.open.pop(call.arguments[0], None)
        elif call.name == "mkdir":
            mine = next(self._next)
            self.disk.folders[mine] = {}
            self.start.folders[mine] = {}
            self.entries(path, {name: mine})
        elif call.name in ("unlink", "rmdir"):
            self.entries(path, {name: None})
        elif call.name in ("rename", "replace", "renameat2"):
            assert call.name != "renameat2" or result == 0
            target = str(call.arguments[1])
            if os.path.dirname(path) == os.path.dirname(target):
                other = self.number(target) if call.arguments[-1] == EXCHANGE else None
                self.entries(path, {name: other, os.path.basename(target): self.number(path)})
            else:  # no disk need keep both changes together
                moved = self.number(path)
                self.entries(target, {os.path.basename(target): moved})
                self.entries(path, {name: None})
        elif call.name == "ftruncate":
            self.step(Size(self.open[call.arguments[0]], call.arguments[1]))
        elif call.name == "posix_fallocate":
            fd, offset, size = call.arguments
            self.step(Size(self.open[fd], max(len(self.disk.files[self.open[fd]]), offset + size)))
        elif call.name == "write":  # only to the end of files
            file = self.open[call.arguments[0]]
            self.step(Write(file, len(self.disk.files[file]), bytes(call.arguments[1][:result])))
        elif call.name == "pwrite":
            fd, data, offset = call.arguments
            self.step(Write(self.open[fd], offset, bytes(data[:result])))
        elif call.name == "fsync":
            self.step(Sync(self.open[call.arguments[0]]))
        return result


def record(root: Path, work: Callable[[], object]) -> tuple[Disk, list[Step]]:
    """Do `work` below `root`. Returns the state before it, all durable, and the steps that it made."""
    recorder = _Recorder(root)
    with passing(root, recorder):
        work()
    return recorder.start, recorder.steps


def states(start: Disk, steps: list[Step], *, first: int = 0, seed: int = 0, often: int = 1) -> Iterator[Tree]:
    """Yield the states that can be left if the power fails after the `first` step or a later one, each once. Only one
    in `often` of the fates is tried."""
    durable, pending = start.copy(), list[Step]()
    chance, seen, tried = random.Random(seed), set[str](), 0
    for at, step in enumerate([None, *steps]):
        if isinstance(step, Sync):
            for done in (step_ for step_ in pending if step_.owner == step.owner):
                durable.apply(done)
            pending = [step_ for step_ in pending if step_.owner != step.owner]
        elif step is not None:
            pending.append(step)
        if at < first:
            continue
        for fates in _fates(pending, chance):
            tried += 1
            if tried % often:
                continue
            tree = _crashed(durable, pending, fates)
            if (key := digest_of(repr(tree).encode())) not in seen:
                seen.add(key)
                yield tree


def _crashed(durable: Disk, pending: list[Step], fates: list[int]) -> Tree:
    disk, missing = durable.copy(), set[tuple[int, str]]()
    for step, fate in zip(pending, fates):
        if isinstance(step, Entries):
            names = {(step.owner, name) for name in step.names}
            if fate != KEPT or names & missing:
                missing |= names
                continue
        disk.apply(step, fate)
    return disk.tree()


def _possible(step: Step) -> list[int]:
    return [LOST, FIRST_HALF, LAST_HALF, ZEROS, KEPT] if isinstance(step, Write) else [LOST, KEPT]


def _fates(pending: list[Step], chance: random.Random) -> Iterator[list[int]]:
    """Yield ways in which the pending steps can end: all of them if they are few. If they are many: each step alone on
    either side and every beginning and end, or a sample of those, and a random sample of all."""
    every = [_possible(step) for step in pending]
    if math.prod(map(len, every)) <= _FEW:
        yield from map(list, itertools.product(*every))
        return
    count = len(pending)
    chosen = []
    for i, fates in enumerate(every):
        chosen += [[KEPT] * i + [fate] + [KEPT] * (count - i - 1) for fate in fates]
        chosen += [[LOST] * i + [fate] + [LOST] * (count - i - 1) for fate in fates]
        chosen += [[KEPT] * i + [LOST] * (count - i), [LOST] * i + [KEPT] * (count - i)]
    yield from chance.sample(chosen, min(len(chosen), _SAMPLE))
    for _ in range(_SAMPLE):
        kept = chance.random()
        yield [KEPT if chance.random() < kept else chance.choice(fates) for fates in every]


def put(tree: Tree, folder: Path) -> None:
    """Make a folder with the content of `tree`."""
    folder.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            put(content, folder / name)
        else:
            (folder / name).write_bytes(content)


def taken(folder: Path) -> Tree:
    """Return the content of a folder."""
    return {path.name: taken(path) if path.is_dir() else path.read_bytes() for path in sorted(folder.iterdir())}

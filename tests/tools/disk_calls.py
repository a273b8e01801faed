"""Interception of this process's file system calls on one folder and below: the test gets each instead."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pico
import pytest

import reshard
import reshard.operations.plan
import reshard.storage.disk
from reshard.execution.origin import Origin
from reshard.operations.convert import work
from reshard.planning.plan import ReshardPlan, plan_layouts

CALLS = (
    *("open", "close", "write", "pwrite", "preadv", "fsync", "ftruncate", "posix_fallocate"),
    *("mkdir", "unlink", "rmdir", "rename", "replace", "renameat2", "listdir", "scandir", "statvfs", "flock"),
)


@dataclass(frozen=True)
class Call:
    """One call before it is made; calling this makes it. `path` is the path that it works on."""

    name: str
    path: str
    real: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> Any:
        return self.real(*self.arguments, **self.options)


Around = Callable[[Call], Any]


def _path(arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    path = arguments[0]
    if isinstance(path, int):
        return _of(path)
    folder = options.get("dir_fd")
    return os.path.join(os.getcwd() if folder is None else _of(folder), path)


def _of(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


@contextlib.contextmanager
def passing(root: Path, around: Around) -> Iterator[None]:
    """Inside the context, replace every call on `root` and below by `around(call)`: it makes it, or raises OSError."""

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def once(*arguments: Any, **options: Any) -> Any:
            path = _path(arguments, options) if arguments else ""
            if path != str(root) and not path.startswith(f"{root}/"):
                return real(*arguments, **options)
            return around(Call(name, path, real, arguments, options))

        return once

    def renameat2(*arguments: Any) -> int:
        try:
            return around(Call("renameat2", str(arguments[0]), real_renameat2, arguments, {}))
        except OSError as error:
            return error.errno or errno.EIO

    real_renameat2 = reshard.storage.disk._renameat2
    with pytest.MonkeyPatch.context() as patch:
        for name in set(CALLS) & set(dir(os)):
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        patch.setattr(fcntl, "flock", wrapped("flock", fcntl.flock))
        patch.setattr(reshard.storage.disk, "_renameat2", renameat2)
        yield


@contextlib.contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A folder in memory if the system has one, so that thousands of tries need not reach the disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="reshard-", dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def make_folders(room: Path) -> Path:
    """Make a checkpoint, reshard it for two ranks (`whole`) and four (`other`), and merge it (`merged`). Return it."""
    source = pico.save("llama", room / "source")
    reshard.convert(source, room / "whole", tp_size=2)
    reshard.convert(source, room / "other", tp_size=4)
    reshard.merge(room / "whole", room / "merged")
    return source


@contextlib.contextmanager
def already_planned(planned: ReshardPlan) -> Iterator[None]:
    """Inside the context, `reshard.convert` skips the planning, to take milliseconds; call it for this plan only."""
    with pytest.MonkeyPatch.context() as patch:
        layouts = plan_layouts(planned)
        patch.setattr(work, "open_origin", lambda *_, **__: Origin(planned.source))
        patch.setattr(reshard.operations.plan, "plan_of", lambda *_, **__: planned)
        patch.setattr(reshard.operations.plan, "filled", lambda *_: layouts)
        patch.setattr(work, "version", functools.cache(work.version))
        yield

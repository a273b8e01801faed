"""What one process does so that no other comes between: a lock beside a folder, and moves of folders in one step."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import BusyError, StorageError, printable

__all__ = ["EXCHANGE", "NOREPLACE", "locked", "move", "renamed"]

_AT_FDCWD, NOREPLACE, EXCHANGE = -100, 1, 2  # renameat2(2)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # what network file systems say


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` locked, on a file system that has locks. The lock ends with the process; its holder removes the file,
    and one that stays is free. Raises BusyError, StorageError."""
    with contextlib.ExitStack() as held:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            held.callback(_whatever, os.close, fd)
            if not _lock(fd, path):
                raise BusyError(f"{printable(path)}: another process is writing this folder")
            held.callback(_whatever, os.unlink, path)
        except OSError as error:
            raise StorageError(f"{printable(path)}: {error.strerror}") from None
        yield


def _whatever(call: Callable[[Any], None], argument: Any) -> None:
    with contextlib.suppress(OSError):
        call(argument)


def _lock(fd: int, path: Path) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return True
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    try:
        # The last holder may have removed the file between our open and our lock: then it protects nothing.
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def renamed(old: Path, new: Path) -> bool:
    """Rename, unless another process was first. Raises OSError."""
    try:
        os.rename(old, new)
    except FileNotFoundError:
        return False
    return True


def move(old: Path, new: Path, flag: int) -> None:
    """rename(2) that never replaces, or that exchanges: where the system has it; else the nearest plain steps.

    Raises OSError."""
    code = errno.EINTR
    while code == errno.EINTR:
        code = _renameat2(old, new, flag)
    if code not in (0, errno.ENOSYS, errno.EINVAL):
        raise OSError(code, os.strerror(code))
    if not code:
        return
    if flag == EXCHANGE:
        aside = new.with_name(new.name + ".old")
        os.rename(new, aside)
        os.rename(old, new)
        os.rename(aside, old)
    elif os.path.lexists(new):
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    else:
        os.rename(old, new)


def _renameat2(old: Path, new: Path, flag: int) -> int:
    """Error number; 0 when it is done."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return errno.ENOSYS
    if function(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flag) == 0:
        return 0
    return ctypes.get_errno()

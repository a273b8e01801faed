"""This machine's disk: whole writes, durable folders, free space, locks, and moves of folders in one step."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import BusyError, ReshardError, StorageError
from ..files.digest import new_digest
from ..files.system import by_errno, walked
from ..resharded.rank_file import FileRecord
from ..text import printable

__all__ = [
    "EXCHANGE",
    "NOREPLACE",
    "check_free_space",
    "copy_file",
    "discard",
    "locked",
    "make_folders",
    "move",
    "pwrite",
    "renamed",
    "sync_file",
    "sync_folder",
    "write_error",
    "write_file",
]

_AT_FDCWD, NOREPLACE, EXCHANGE = -100, 1, 2  # renameat2(2)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # what network file systems without locks say


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on `path`, if the file system has locks. Raises BusyError, StorageError.

    The lock ends with the process. Its holder removes the file; a file that stays behind is not locked.
    """
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
        # The last holder may have removed the file between our open and our lock: then our lock protects nothing.
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def renamed(old: Path, new: Path) -> bool:
    """Rename a file or folder; return False if another process was first. Raises OSError."""
    try:
        os.rename(old, new)
    except FileNotFoundError:
        return False
    return True


def move(old: Path, new: Path, flag: int) -> None:
    """Move `old` to `new`: NOREPLACE never replaces anything, EXCHANGE swaps the two. Raises OSError.

    This is one call of renameat2(2) if the system has it, otherwise the nearest plain steps.
    """
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
    """Return the error number; 0 if the move is done."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return errno.ENOSYS
    if function(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flag) == 0:
        return 0
    return ctypes.get_errno()


# Linux takes page cache for a larger write in pieces so large that finding them can cost more than the write: in a
# virtual machine, 2.3 s for 3 GB in writes of 4 MiB, and 0.8 s in these.
_WRITE_BYTES = 256 << 10


_NOTHING_LOST = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def pwrite(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data`, however little the system takes at a time. Raises OSError."""
    while data:
        written = os.pwrite(fd, data[:_WRITE_BYTES], offset)
        if not written:  # otherwise this would go on for ever
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data, offset = data[written:], offset + written


def write_error(path: Path, error: OSError, *, synced: bool = False) -> ReshardError:
    """Return the error to raise if the disk refuses a write or, with `synced`, to keep what was written.

    `lost` says whether data written earlier may be lost. If a disk failed, the cache goes on showing what was written,
    not what was kept, and the next fsync says that all is well. If the disk was full, or this process was short of a
    resource, nothing is lost.
    """
    failure = by_errno(error, f"{printable(path)}: {error.strerror}", StorageError)
    failure.lost = synced or error.errno not in _NOTHING_LOST
    return failure


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable. Raises StorageError."""
    _sync(folder, os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Make the content of a file durable, whoever wrote it. Raises StorageError."""
    _sync(path, os.O_NOFOLLOW)


def _sync(path: Path, flag: int) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flag)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError(f"{printable(path)}: {error.strerror}") from None


_BLOCK = 4 << 20  # bytes


def make_folders(folder: Path, names: Iterable[str]) -> None:
    """Make the folders inside `folder` that files of these paths need. Raises StorageError."""
    for inside in sorted({parent for name in names for parent in PurePosixPath(name).parents[:-1]}):
        try:
            (folder / inside).mkdir(exist_ok=True)  # never `folder` itself: another process may have taken it
        except OSError as error:
            raise StorageError(f"{printable(folder / inside)}: {error.strerror}") from None


def write_file(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write a small file, whole or not at all, over one that an earlier run left; with `sync`, through to the disk."""
    _write(path, [memoryview(data)], sync)


def copy_file(source: Path, folder: Path, name: str, *, sync: bool = True) -> FileRecord:
    """Copy a small file into `folder` as `write_file` writes it, into a subfolder if its name has a "/"."""
    digest, size = new_digest(), 0

    def blocks() -> Iterator[memoryview]:
        nonlocal size
        buffer = memoryview(bytearray(_BLOCK))
        with open(source, "rb", buffering=0) as file:
            while found := file.readinto(buffer):
                digest.update(buffer[:found])
                size += found
                yield buffer[:found]

    make_folders(folder, [name])
    _write(folder / name, blocks(), sync)
    return FileRecord(name, size, digest.hexdigest(), {})


def _write(path: Path, blocks: Iterable[memoryview], sync: bool) -> None:
    part, at = path.with_name(f".{path.name}.part"), 0
    try:
        part.unlink(missing_ok=True)
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            for block in blocks:
                pwrite(fd, block, at)
                at += len(block)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(part, path)
    except OSError as error:
        raise StorageError(f"{printable(error.filename or path)}: {error.strerror}") from None


def check_free_space(folder: Path, needed: int, *others: Path) -> None:
    """Raise StorageError, with bytes needed and free, if `folder`'s disk has no room for `needed` bytes.

    `needed` counts all bytes that are to be in `folder`, and in `others` on the same disk. What is in them already is
    included.
    """
    there = 0
    try:
        for root, _, names in itertools.chain(*map(walked, filter(os.path.lexists, (folder, *others)))):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # a file that arrives meanwhile is renamed
                    there += os.lstat(os.path.join(root, name)).st_blocks * 512
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise StorageError(f"{printable(folder)}: {error.strerror}") from None
    if free + there < needed:
        raise StorageError(f"{printable(folder)}: needs {needed - there:,} bytes, but only {free:,} are free")


def discard(path: Path) -> None:
    """Remove a file of the cache and what it links to, so that it is fetched again."""
    while True:
        target = path.parent / path.readlink() if path.is_symlink() else None
        path.unlink(missing_ok=True)
        if target is None:
            return
        path = target

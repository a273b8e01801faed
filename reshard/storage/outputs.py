"""The output files of a plan, of which a limited number are open at a time."""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import StorageError
from ..files.digest import new_digest
from ..files.mapped import mapped
from ..files.system import descriptors
from ..resharded.layout import FileLayout, Slot
from ..text import printable
from .disk import pwrite, write_error

__all__ = ["OutputFiles", "begin_writeback", "create", "digest_in"]


class OutputFiles:
    """Files made at their full size, with their headers in place. They are new, unless `anew` is false.

    At most half of the descriptors that the process may have are open at a time: to open another file, the one used
    longest ago is closed. `most` is that number, and that of the threads that may write at once. The methods raise
    OSError; making a file raises StorageError.
    """

    def __init__(self, folder: Path, layouts: Sequence[FileLayout], *, anew: bool) -> None:
        self._paths = [folder / layout.name for layout in layouts]
        self.most = max(1, descriptors() // 2)
        self._open: dict[int, int] = {}  # descriptors, the one used longest ago first
        self._users = [0] * len(layouts)
        self._kept: dict[int, memoryview] = {}
        self._lock = threading.Lock()
        try:
            for index, layout in enumerate(layouts):
                self._make_room()
                self._open[index] = create(self._paths[index], layout, anew=anew)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> OutputFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that are open."""
        with contextlib.ExitStack() as closing:
            for fd in self._open.values():
                closing.callback(os.close, fd)
            self._open.clear()

    @contextlib.contextmanager
    def opened(self, index: int) -> Iterator[int]:
        """Give the descriptor of a file, which stays open until the block ends."""
        with self._lock:
            fd = self._descriptor(index)
            self._users[index] += 1
        try:
            yield fd
        finally:
            with self._lock:
                self._users[index] -= 1

    def sync(self) -> None:
        """Have the disk keep every file."""
        for index in range(len(self._paths)):
            with self.opened(index) as fd:
                os.fsync(fd)

    def _descriptor(self, index: int) -> int:
        fd = self._open.pop(index, None)
        if fd is None:
            self._make_room()
            fd = os.open(self._paths[index], os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._open[index] = fd  # last
        return fd

    def _make_room(self) -> None:
        if len(self._open) < self.most:
            return
        index = next(index for index in self._open if not self._users[index])
        fd = self._open.pop(index)
        try:
            # While a part of a file is mapped the system remembers the file, and that writing it back has failed:
            # fsync tells that also to a descriptor that is opened later.
            if index not in self._kept and os.fstat(fd).st_size:
                self._kept[index], _ = mapped(fd, 1)
        finally:
            os.close(fd)


_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # only Linux has it


_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, and do not wait


_WORTH_BEGINNING = 1 << 20  # bytes


def begin_writeback(fd: int, offset: int, size: int) -> None:
    """Let the disk begin on what was just written, while the next block is made: fsync then has less to do.

    This is a hint that promises nothing, so nothing is lost if it fails or the system lacks it.
    """
    if _sync_file_range is not None and size >= _WORTH_BEGINNING:
        _sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(size), _WRITE)


def digest_in(fd: int, slot: Slot, block: memoryview) -> str:
    """Return the digest of what a file holds in a tensor's place."""
    digest, at, end = new_digest(), slot.offset, slot.offset + slot.tensor.nbytes
    while at < end:
        size = os.preadv(fd, [block[: end - at]], at)
        if not size:
            break
        digest.update(block[:size])
        at += size
    return digest.hexdigest()


def create(path: Path, layout: FileLayout, *, anew: bool) -> int:
    """Make a file of its full size, with its header in place; it must be new if `anew`. Return its descriptor."""
    flags = os.O_RDWR | os.O_CREAT | (os.O_EXCL if anew else 0) | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o644)
    except OSError as error:
        raise StorageError(f"{printable(path)}: {error.strerror}") from None
    try:
        try:
            there = os.fstat(fd)
            if not stat.S_ISREG(there.st_mode) or there.st_nlink > 1:  # somebody put it there; it may be another's
                raise StorageError(f"{printable(path)}: Is not a file of this command")
            if there.st_size > layout.size:
                os.ftruncate(fd, layout.size)
            if layout.size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, layout.size)
            pwrite(fd, memoryview(layout.head), 0)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise write_error(path, error) from None
    return fd

"""One output file: made at its full size, written at offsets, read back."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from pathlib import Path

from ..errors import ReshardError, StorageError, printable
from ..files.digest import new_digest
from ..files.system import by_errno
from ..resharded.layout import FileLayout, Slot

__all__ = ["begin_writeback", "create", "digest_in", "pwrite", "write_error"]

# For a larger write Linux takes page cache in pieces so large that finding them can cost more than the write: in a
# virtual machine, 2.3 s for 3 GB in writes of 4 MiB, and 0.8 s in these.
_WRITE_BYTES = 256 << 10
_NOTHING_LOST = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def pwrite(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data`, however little the system takes at a time. Raises OSError."""
    while data:
        written = os.pwrite(fd, data[:_WRITE_BYTES], offset)
        if not written:  # or this would go on for ever
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data, offset = data[written:], offset + written


_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux has it
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, and do not wait
_WORTH_BEGINNING = 1 << 20  # bytes


def begin_writeback(fd: int, offset: int, size: int) -> None:
    """Let the disk begin on what was just written, while the next block is made: less is left for fsync at the end.

    A hint: it promises nothing, so that nothing is lost where it fails or is not known.
    """
    if _sync_file_range is not None and size >= _WORTH_BEGINNING:
        _sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(size), _WRITE)


def digest_in(fd: int, slot: Slot, block: memoryview) -> str:
    """Digest of what stands in a file in a tensor's place."""
    digest, at, end = new_digest(), slot.offset, slot.offset + slot.tensor.nbytes
    while at < end:
        size = os.preadv(fd, [block[: end - at]], at)
        if not size:
            break
        digest.update(block[:size])
        at += size
    return digest.hexdigest()


def create(path: Path, layout: FileLayout, *, anew: bool) -> int:
    """A file of its full size, with its header in place: a new one, or with `anew` false one that may be there."""
    flags = os.O_RDWR | os.O_CREAT | (os.O_EXCL if anew else 0) | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o644)
    except OSError as error:
        raise StorageError(f"{printable(path)}: {error.strerror}") from None
    try:
        try:
            there = os.fstat(fd)
            if not stat.S_ISREG(there.st_mode) or there.st_nlink > 1:  # somebody put it there, and it may be another's
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


def write_error(path: Path, error: OSError, *, synced: bool = False) -> ReshardError:
    """What to raise when the disk refuses a write, or with `synced` to have kept what was written.

    Of a disk that failed, the cache goes on showing what was written, not what was kept, and the next fsync says that
    all is well. A disk that was full when it was written to has lost nothing, and of what the system has too little of
    only this process knows.
    """
    failure = by_errno(error, f"{printable(path)}: {error.strerror}", StorageError)
    failure.lost = synced or error.errno not in _NOTHING_LOST
    return failure


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError(f"{printable(folder)}: {error.strerror}") from None

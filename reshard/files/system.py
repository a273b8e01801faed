"""Refusals of the operating system as errors of ours. The error number decides which one, here alone.

A file that is missing, or is a folder, says something about the checkpoint it belongs to: each caller knows what. Any
other refusal says nothing about the bytes. If too many files are open, memory is short, the disk fails, or the right to
read is missing, the files may all be as they should, so nothing is concluded about them.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from ..errors import ReshardError, StorageError
from ..text import printable

__all__ = ["LOCAL", "by_errno", "descriptors", "explained", "walked"]

_OF_THE_PATH = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ),
    *(errno.ENXIO, errno.ENODEV),  # a socket, or a device
}
# Errors that no network and no file name can cause.
LOCAL = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
}
_MAY_NOT = "this user may not: change the permissions, or run it as another user"
_HINTS = {
    errno.EMFILE: "raise the limit on open files, as with: ulimit -n 4096",
    errno.ENFILE: "the machine has too many open files: end what holds them, or raise fs.file-max",
    errno.ENOMEM: "free memory; for tens of thousands of files, raise vm.max_map_count",
    errno.EIO: "the disk or the network file system fails: see the system's log",
    errno.EACCES: _MAY_NOT,
    errno.EPERM: _MAY_NOT,
}


def by_errno(
    error: BaseException, message: str, otherwise: type[ReshardError], *, hint: str | None = None
) -> ReshardError:
    """Return the error to raise for `error`: StorageError if it, or an error it was raised from, is a refusal that says
    nothing about the file; else `otherwise`, with the caller's hint."""
    if (refusal := _refusal(error)) is None:
        return otherwise(message, hint=hint)
    return StorageError(message, hint=_HINTS.get(refusal.errno or 0))


def explained(error: BaseException) -> BaseException:
    """Return an unexpected error as a StorageError if it is a refusal of the system, else as it is."""
    if not isinstance(error, OSError) or isinstance(error, ReshardError) or _refusal(error) is not error:
        return error
    of = "" if error.filename is None else f"{printable(error.filename)}: "
    return by_errno(error, f"{of}{error.strerror}", StorageError)


def _refusal(error: BaseException | None) -> OSError | None:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno is not None and _of_this_machine(error):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _of_this_machine(error: OSError) -> bool:
    """Whether this machine, not the file's name or the other side of a socket, is the cause."""
    return error.errno in LOCAL or (error.filename is not None and error.errno not in _OF_THE_PATH)


def walked(folder: Path, *, topdown: bool = True) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk as `os.walk`, but raise OSError for a folder that cannot be listed, which `os.walk` passes over."""

    def fail(error: OSError) -> NoReturn:
        raise error

    return os.walk(folder, topdown, fail)


def descriptors() -> int:
    """Return how many files this process may have open at a time."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit if limit != resource.RLIM_INFINITY else 1 << 20

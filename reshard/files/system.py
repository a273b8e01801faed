"""What the operating system refuses, as an error of ours. Which one is decided by its number, here alone.

That a file is missing, or is a folder, says something of the checkpoint it belongs to: each caller knows what. Any
other refusal says nothing of any bytes. Too many files are open, memory is short, the disk fails, or the right to read
is missing: the files may all be as they should, so nothing is concluded of them.
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
# Those that no network and no name can be the reason of.
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
    """The error to raise for one that may be the operating system's: StorageError if it, or what it was raised for,
    says nothing of the file; else what the caller makes of it, with the caller's hint."""
    if (refusal := _refusal(error)) is None:
        return otherwise(message, hint=hint)
    return StorageError(message, hint=_HINTS.get(refusal.errno or 0))


def explained(error: BaseException) -> BaseException:
    """An error that nobody expected: as a StorageError if it is such a refusal, else as it is."""
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
    """Of a socket's errors only those that are not the other side's."""
    return error.errno in LOCAL or (error.filename is not None and error.errno not in _OF_THE_PATH)


def walked(folder: Path, *, topdown: bool = True) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk`, which by itself passes over what cannot be listed. Raises OSError."""

    def fail(error: OSError) -> NoReturn:
        raise error

    return os.walk(folder, topdown, fail)


def descriptors() -> int:
    """How many files this process may have open at a time."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit if limit != resource.RLIM_INFINITY else 1 << 20

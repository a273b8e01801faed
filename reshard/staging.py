"""The output folder: built beside its place, and moved there in one step when it is whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import BusyError, DestinationExistsError, StorageError, printable
from .source import MANIFEST_NAME

__all__ = ["check_free_space", "copy_file", "staged_folder", "sync_folder", "write_file"]

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2  # renameat2(2)


@contextlib.contextmanager
def staged_folder(out: Path, *, overwrite: bool = False, sync: bool = True) -> Iterator[Path]:
    """Give a new folder to fill; put it at `out` when the block ends well, and leave nothing when it does not.

    The move never replaces anything, unless `overwrite` and `out` is a folder of ours; then the two are exchanged in
    one step. With `sync`, folder and move are on disk on return. One process at a time: `OUT.lock` is held meanwhile.

    Raises:
        DestinationExistsError: `out` exists (now, or when the work is done).
        BusyError: another process is at work on `out`.
        StorageError: the disk refused.
    """
    out = Path(os.path.abspath(out))
    _check_destination(out, overwrite)
    part = out.with_name(out.name + ".part")
    with _lock(out.with_name(out.name + ".lock")):
        try:
            _remove(part)
            part.mkdir(mode=0o755)
        except OSError as error:
            raise StorageError(f"{printable(part)}: {error.strerror}") from None
        try:
            yield part
            if sync:
                sync_folder(part)
            _check_destination(out, overwrite)
            _move(part, out, overwrite)
            if sync:
                sync_folder(out.parent)
        finally:
            _remove(part)  # after an exchange this is the old folder


def _check_destination(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        if not out.parent.is_dir():
            raise StorageError(f"{printable(out.parent)}: no such folder")
        return
    if not overwrite:
        raise DestinationExistsError(
            f"{printable(out)}: already exists", hint="choose another name, or use --overwrite"
        )
    if out.is_symlink() or not (out / MANIFEST_NAME).is_file():
        raise DestinationExistsError(
            f"{printable(out)}: is not a resharded folder, so --overwrite does not replace it",
            hint="choose another name",
        )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold `path` locked; the lock ends with the process, the file is removed by its holder."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(f"{printable(path)}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have removed the file between our open and our lock: then it protects nothing.
            held = os.path.samestat(os.fstat(fd), os.stat(path))
        except OSError:
            held = False
        if not held:
            raise BusyError(f"{printable(path)}: another process is writing this folder")
        try:
            yield
        finally:
            os.unlink(path)
    finally:
        os.close(fd)


def _move(part: Path, out: Path, overwrite: bool) -> None:
    flag = _EXCHANGE if overwrite and os.path.lexists(out) else _NOREPLACE
    try:
        _renameat2(part, out, flag)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise DestinationExistsError(f"{printable(out)}: appeared meanwhile") from None
        raise StorageError(f"{printable(out)}: {error.strerror}") from None


def _renameat2(old: Path, new: Path, flags: int) -> None:
    """rename(2) that never replaces, or that exchanges: where the system has it; else the nearest plain steps."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        if function(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code))
    if flags == _EXCHANGE:
        aside = new.with_name(new.name + ".old")
        os.rename(new, aside)
        os.rename(old, new)
        os.rename(aside, old)
    elif os.path.lexists(new):
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    else:
        os.rename(old, new)


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def write_file(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write a small new file; with `sync`, through to the disk."""
    try:
        with open(path, "xb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"{printable(path)}: {error.strerror}") from None


def copy_file(source: Path, target: Path, *, sync: bool = True) -> bytes:
    """Copy a small file as `write_file` writes it. Returns its bytes."""
    try:
        data = source.read_bytes()
    except OSError as error:
        raise StorageError(f"{printable(source)}: {error.strerror}") from None
    write_file(target, data, sync=sync)
    return data


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


def check_free_space(folder: Path, needed: int) -> None:
    """Raises StorageError, with bytes needed and free, where `folder`'s disk cannot hold `needed` more bytes."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise StorageError(f"{printable(folder)}: {error.strerror}") from None
    if free < needed:
        raise StorageError(f"{printable(folder)}: needs {needed:,} bytes, but only {free:,} are free")

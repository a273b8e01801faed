"""The output folder: built beside its place, and moved there in one step when it is whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import BusyError, DestinationExistsError, IntegrityError, StorageError, printable
from .journal import JOURNAL_NAME
from .source import MANIFEST_NAME

__all__ = ["Stage", "check_free_space", "copy_file", "staged_folder", "sync_folder", "write_file"]

_WORK = 16  # hex digits of a digest
_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2  # renameat2(2)


class Stage:
    """The folder that is to become `out`, once it is known what work is done in it."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.folder: Path | None = None

    def begin(self, work: str) -> Path:
        """The folder to fill, named after `work`, the digest of all that goes into it: of the same work, what an
        earlier run left is kept; of other work, it is removed. Raises StorageError."""
        folder = self._out.with_name(f"{self._out.name}.part-{work[:_WORK]}")
        try:
            for other in self._out.parent.glob(f"{glob.escape(self._out.name)}.part-{'?' * _WORK}"):
                if other != folder or other.is_symlink():
                    _remove(other)
            folder.mkdir(mode=0o755, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{printable(folder)}: {error.strerror}") from None
        self.folder = folder
        return folder


@contextlib.contextmanager
def staged_folder(out: Path, *, overwrite: bool = False, sync: bool = True) -> Iterator[Stage]:
    """Give a stage whose folder is to be filled; put that at `out` when the block ends well.

    When it does not, what is there stays for the next run of the same work; when bytes are not what they should be
    (IntegrityError), nothing stays. The move never replaces anything, unless `overwrite` and `out` is a folder of ours;
    then the two are exchanged in one step. With `sync`, folder and move are on disk on return. One process at a time:
    `OUT.lock` is held meanwhile.

    Raises:
        DestinationExistsError: `out` exists (now, or when the work is done).
        BusyError: another process is at work on `out`.
        StorageError: the disk refused.
    """
    out = Path(os.path.abspath(out))
    _check_destination(out, overwrite)
    with _lock(out.with_name(out.name + ".lock")):
        stage = Stage(out)
        try:
            yield stage
            if stage.folder is not None:
                _commit(stage.folder, out, overwrite=overwrite, sync=sync)
        except BaseException as error:
            if stage.folder is not None:
                _leave(stage.folder, error)
            raise


def _leave(folder: Path, error: BaseException) -> None:
    """After a failure: keep what the next run can go on with, and say so where the error has no hint of its own."""
    with contextlib.suppress(OSError):
        journal = folder / JOURNAL_NAME
        if isinstance(error, IntegrityError) or not journal.exists() or not journal.stat().st_size:
            _remove(folder)
        elif getattr(error, "hint", None) is None:
            error.__dict__["hint"] = f"the same command goes on with what is in {printable(folder)}"


def _commit(folder: Path, out: Path, *, overwrite: bool, sync: bool) -> None:
    """Put a whole folder in its place. Without its journal it is no longer gone on with, only put there."""
    try:
        (folder / JOURNAL_NAME).unlink(missing_ok=True)
        if sync:
            sync_folder(folder)
        _check_destination(out, overwrite)
        _move(folder, out, overwrite)
        _remove(folder)  # after an exchange this is the old folder
        if sync:
            sync_folder(out.parent)
    except OSError as error:
        raise StorageError(f"{printable(out)}: {error.strerror}") from None


def _check_destination(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        if not out.parent.is_dir():
            raise StorageError(f"{printable(out.parent)}: no such folder")
        return
    if not overwrite:
        raise DestinationExistsError(
            f"{printable(out)}: already exists",
            hint="choose another name; convert replaces a folder of its own with --overwrite",
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
    """Write a small file, whole or not at all, over one that an earlier run left; with `sync`, through to the disk."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        with open(part, "xb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
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
    """Raises StorageError, with bytes needed and free, where `folder`'s disk cannot hold `needed` bytes in the folder,
    what is in it already included."""
    try:
        there = sum(entry.stat(follow_symlinks=False).st_blocks for entry in os.scandir(folder)) * 512
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise StorageError(f"{printable(folder)}: {error.strerror}") from None
    if free + there < needed:
        raise StorageError(f"{printable(folder)}: needs {needed - there:,} bytes, but only {free:,} are free")

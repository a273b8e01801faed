"""The output folder: built beside its final path, and moved there in one step when it is complete."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import BusyError, StorageError
from ..files.system import by_errno
from ..storage.disk import locked, renamed, sync_folder
from ..text import printable
from .destination import Destination
from .journal import JOURNAL_NAME

__all__ = [
    "Stage",
    "discard_folder",
    "discard_refused",
    "staged_folder",
]

_WORK, _OWNER = 16, 8  # hex digits: of the digest of the work, and of a number drawn by each run
_REFUSE = "0" * _WORK  # in place of the work: the folder is only there to be removed
_ATTEMPTS = 9  # to remove a folder while its former owner makes a last file in it


class Stage:
    """The folder that is to become `out`. It exists once `begin` is told what work is done in it."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.folder: Path | None = None

    @property
    def fresh(self) -> bool:
        """Whether no earlier run left anything there."""
        return not _unfinished(self._out)

    @property
    def begun(self) -> bool:
        """Whether there is anything that the next run can go on with."""
        return self.folder is not None and _has_claims(self.folder)

    def beside(self, name: str) -> Path:
        """Return a path beside the output for what the work needs on the way."""
        return self._out.with_name(f"{self._out.name}.part-{name}")

    def clear(self, prefix: str) -> None:
        """Remove every such path whose name begins with `prefix`, of earlier runs too."""
        for path in self._out.parent.glob(f"{glob.escape(self._out.name)}.part-{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)

    def begin(self, work: str) -> Path:
        """Return the folder to fill, named after `work`, the digest of all that goes into it. Raises StorageError.

        What an earlier run left of the same work is kept; what is left of other work is removed.

        The name is this run's alone, and what was left is renamed before anything else is done to it. So if locks do
        nothing, a run that is alive loses its folder in one step, notices (BusyError), and can put nothing into the
        folder of another run; the last to begin loses to none. The loser may go on writing to files it has open, but
        the same bytes: only the same work keeps them.
        """
        folder, kept = _part(self._out, work), False
        try:
            for left in _unfinished(self._out):
                if not kept and left.name[:-_OWNER] == folder.name[:-_OWNER] and renamed(left, folder):
                    # A folder without a journal is what --overwrite replaced, or is half removed.
                    kept = not folder.is_symlink() and (folder / JOURNAL_NAME).exists()
                    left = folder
                if not kept or left != folder:
                    _discard(left, self._out)
            if not kept:
                # Another run that failed may have removed the folder above, which it had made.
                folder.mkdir(mode=0o755, parents=True)
        except OSError as error:
            raise by_errno(error, f"{printable(folder)}: {error.strerror}", StorageError) from None
        self.folder = folder
        return folder


def _part(out: Path, work: str) -> Path:
    return out.with_name(f"{out.name}.part-{work[:_WORK]}-{secrets.token_hex(_OWNER // 2)}")


def _unfinished(out: Path) -> list[Path]:
    name = re.compile(rf"{re.escape(out.name)}\.part-[0-9a-f]{{{_WORK}}}-[0-9a-f]{{{_OWNER}}}")
    return [out.with_name(entry) for entry in os.listdir(out.parent) if name.fullmatch(entry)]


@contextlib.contextmanager
def staged_folder(to: Destination) -> Iterator[Stage]:
    """Give a stage whose folder is to be filled; put that at its destination if the block ends well.

    The folders above it are made too. If the block fails, what is there stays for the next run of the same work. If
    bytes that were used are not what they should be (`error.lost`), nothing stays, nor a folder above that was made for
    it. One process at a time works on it: `OUT.lock` is held meanwhile. If locks do nothing, see `Stage.begin`.

    Raises:
        DestinationExistsError: something is in the way (now, or when the work is done).
        BusyError: another process is at work on it.
        StorageError: the disk refused.
    """
    out = to.local
    to.check()
    with _existing(out.parent), locked(out.with_name(out.name + ".lock")):
        to.check()  # the process that held the lock before may have made it
        to.try_out()
        stage = Stage(out)
        try:
            yield stage
            if stage.folder is not None:
                to.commit(stage.folder)
                _clear_away(stage.folder, out)
        except BaseException as error:
            if stage.folder is not None:
                if _taken(stage.folder, error):
                    raise BusyError(f"{printable(out)}: another process is writing this folder") from None
                _leave(stage.folder, out, error)
            raise


def _taken(folder: Path, error: BaseException) -> bool:
    """Whether an error arose because another process has taken the folder, where there are no locks."""
    gone = getattr(error.__context__, "errno", None) in (errno.ENOENT, errno.ESTALE)
    return gone and not os.path.lexists(folder)


def _leave(folder: Path, out: Path, error: BaseException) -> None:
    """Keep what the next run can go on with after a failure, and say so if the error has no hint of its own."""
    with contextlib.suppress(OSError):
        if getattr(error, "lost", False) or not _has_claims(folder):
            _discard(folder, out)
        elif getattr(error, "hint", None) is None:
            error.__dict__["hint"] = f"the same command goes on with what is in {printable(folder)}"


def _has_claims(folder: Path) -> bool:
    try:
        return (folder / JOURNAL_NAME).stat().st_size > 0
    except OSError:
        return False


def _clear_away(folder: Path, out: Path) -> None:
    """Remove the folder that was replaced, or sent away: no power loss puts it back any more."""
    try:
        if os.path.lexists(folder):
            _discard(folder, out)
    except OSError as error:
        raise StorageError(
            f"{printable(out)}: is in place, but what it replaced could not be removed: {error.strerror}"
        ) from None


def discard_folder(folder: Path, out: Path, *, sync: bool = False) -> None:
    """Remove a folder that was to become `out`, or a part of it. If that is interrupted, the next run goes on with it.
    With `sync`, no power loss brings back a half of it under its own name.

    Raises StorageError.
    """
    try:
        _discard(folder, out, sync=sync)
    except OSError as error:
        raise StorageError(f"{printable(folder)}: cannot be removed: {error.strerror}") from None


def discard_refused(out: Path) -> None:
    """Remove the folders beside `out` that an earlier run was interrupted in removing. Raises StorageError."""
    for left in _unfinished(out):
        if left.name.startswith(f"{out.name}.part-{_REFUSE}"):
            discard_folder(left, out)


def _discard(folder: Path, out: Path, *, sync: bool = False) -> None:
    """Remove a folder, first renamed so that no other process can put it in place meanwhile. Raises OSError."""
    refuse = _part(out, _REFUSE)
    if not renamed(folder, refuse):
        return
    if sync:
        sync_folder(folder.parent)
    for _ in range(_ATTEMPTS):
        try:
            refuse.unlink() if refuse.is_symlink() else shutil.rmtree(refuse)
            return
        except OSError as error:  # a process that lost it can still be at its last call; the next run finds what stays
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise


@contextlib.contextmanager
def _existing(folder: Path) -> Iterator[None]:
    """Make a folder and those above it, if need be; after a failure, remove those again that are empty."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        try:
            if missing:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{printable(folder)}: {error.strerror}") from None
        for path in missing:
            sync_folder(path.parent)
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # something is in it
            for path in missing:
                path.rmdir()
        raise

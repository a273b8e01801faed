"""The destinations of a finished folder: a path on this machine's disk, or an object store."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..checkpoint.kinds import is_weights
from ..checkpoint.source import MANIFEST_NAME
from ..checkpoint.weights import INDEX_NAME, SINGLE_NAME
from ..errors import DestinationExistsError, IntegrityError, ReshardError, StorageError, UsageError
from ..files.digest import digest_of
from ..files.system import walked
from ..process import Progress, silent
from ..resharded.manifest import read_manifest
from ..resharded.strangers import missing_and_strange
from ..storage.disk import EXCHANGE, NOREPLACE, move, sync_folder
from ..storage.hub.address import is_hub_url
from ..storage.stores import PROBE_NAME, as_text, cache_folder, is_url, open_store
from ..text import listed, printable
from .journal import JOURNAL_NAME

__all__ = ["Destination", "destination", "send", "send_one"]

_SMALL = 8 << 20  # bytes: files up to this size are sent several at a time, larger ones in several parts
_AT_ONCE = 8
_LAST = (MANIFEST_NAME, INDEX_NAME, SINGLE_NAME)  # the first that a folder has goes last: it says the others are there


class Destination(Protocol):
    """The destination of a folder, which is filled beside `local`, under another name, and put there when complete."""

    @property
    def local(self) -> Path:
        """A path on this machine."""

    def check(self) -> None:
        """Raise DestinationExistsError if something is in the way, StorageError if there is no way."""

    def try_out(self) -> None:
        """Raise a ReshardError if `commit` could put nothing there. Called before any work, under the lock."""

    def commit(self, folder: Path) -> None:
        """Put a complete folder there. Raises a ReshardError.

        Whatever is at the folder's old path afterwards is ours to delete.
        """


def destination(
    out: str | Path, *, overwrite: bool | None = None, sync: bool = True, progress: Progress = silent
) -> Destination:
    """Return the destination for a path or a URL. Raises UsageError for a place on the Hub.

    `overwrite` is None if there is no such choice; `progress` is told of what is sent.
    """
    out = as_text(out)
    if is_hub_url(out):
        raise UsageError(
            f"{printable(out)}: is on the Hub", hint="choose a folder, and put that there with: reshard publish"
        )
    return _InStore(out, overwrite, progress) if is_url(out) else _OnDisk(Path(os.path.abspath(out)), overwrite, sync)


@dataclass(frozen=True, slots=True)
class _OnDisk:
    """A path: it takes the folder in one step, which never replaces anything.

    Only if `overwrite` is set and a resharded folder is there, the two are exchanged. With `sync`, folder and move are
    on disk when it is done.
    """

    local: Path
    overwrite: bool | None
    sync: bool

    def check(self) -> None:
        out = self.local
        if not os.path.lexists(out):
            self._check_around()
            return
        ours = not out.is_symlink() and (out / MANIFEST_NAME).is_file()
        if not self.overwrite:
            replaces = ours and self.overwrite is not None
            raise DestinationExistsError(
                f"{printable(out)}: already exists",
                hint="choose another name" + (", or replace it with --overwrite" if replaces else ""),
            )
        if not ours:
            raise DestinationExistsError(
                f"{printable(out)}: is not a resharded folder, so --overwrite does not replace it",
                hint="choose another name",
            )
        self._check_inside()

    def _check_around(self) -> None:
        around = next((folder for folder in self.local.parents if (folder / MANIFEST_NAME).is_file()), None)
        if around is not None:
            raise UsageError(
                f"{printable(self.local)}: is inside a resharded folder, which holds nothing else",
                hint=f"choose a folder outside {printable(around)}",
            )

    def _check_inside(self) -> None:
        """Refuse to replace weights and folders that are somebody else's: a source could be in there."""
        while True:
            before = self._identity()
            try:
                manifest = read_manifest(self.local)
            except ReshardError:  # without a manifest nothing says what is ours
                return
            _, found = missing_and_strange(self.local, manifest)
            if self._identity() == before:
                break  # else another run has replaced the folder between the two
        strange = [name for name in found if is_weights(name) or (self.local / name).is_dir()]
        if strange:
            raise DestinationExistsError(
                f"{printable(self.local)}: holds what is not part of it; --overwrite would remove: {listed(strange)}",
                hint="move that elsewhere, or choose another name",
            )

    def _identity(self) -> tuple[int, int]:
        try:
            there = os.lstat(self.local)
        except OSError as error:
            raise StorageError(f"{printable(self.local)}: {error.strerror}") from None
        return there.st_dev, there.st_ino

    def try_out(self) -> None:
        pass  # the folder is filled in the same parent folder

    def commit(self, folder: Path) -> None:
        out = self.local
        try:
            # Without its journal, no later run goes on with the folder: it can only be put there.
            (folder / JOURNAL_NAME).unlink(missing_ok=True)
            if self.sync:
                for inside, _, _ in walked(folder, topdown=False):
                    sync_folder(Path(inside))
            self.check()
            flag = EXCHANGE if self.overwrite and os.path.lexists(out) else NOREPLACE
            move(folder, out, flag)
            try:
                if self.sync:
                    sync_folder(out.parent)
            except StorageError:
                move(out, folder, flag)
                raise
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise DestinationExistsError(f"{printable(out)}: appeared meanwhile") from None
            raise StorageError(f"{printable(out)}: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class _InStore:
    """A URL: the files are sent, last of all the one that completes the folder. Nothing that is there is replaced.

    Files that an earlier run has sent, as what it kept on this machine shows, are compared and stay.
    """

    url: str
    overwrite: bool | None
    progress: Progress

    @property
    def local(self) -> Path:
        return cache_folder() / "unfinished" / digest_of(self.url.rstrip("/").encode())

    def check(self) -> None:
        if self.overwrite:
            raise UsageError(
                "--overwrite: a store cannot exchange two folders in one step",
                hint="choose another name, and remove what is there afterwards",
            )
        there = open_store(self.url)
        if there.files.keys() & set(_LAST):
            raise DestinationExistsError(f"{there}: already exists", hint="choose another name")
        files = there.files.keys() - {PROBE_NAME}
        if files and not any(self.local.parent.glob(f"{self.local.name}.part-*")):
            raise DestinationExistsError(
                f"{there}: holds files of something else: {listed(sorted(files))}",
                hint="choose another name; or remove them, if they are what an interrupted run on another machine left",
            )

    def try_out(self) -> None:
        open_store(self.url).try_out()

    def commit(self, folder: Path) -> None:
        found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        names = {*found} - {JOURNAL_NAME}
        # config.json is the last if it names the weights.
        last = next((name for name in _LAST if name in names), max(names, key=_weights_first))
        strange = sorted(open_store(self.url).files.keys() - {*names, PROBE_NAME})
        if strange:
            raise DestinationExistsError(f"{printable(self.url)}: holds files of something else: {listed(strange)}")
        send(self.url, folder, names - {last}, self.progress)
        send_one(self.url, folder, last)


def _weights_first(name: str) -> tuple[bool, str]:
    return not is_weights(name), name


def send(url: str, folder: Path, names: Iterable[str], progress: Progress = silent) -> None:
    """Send files of a folder to a store, and see that they are there. Nothing that is there is replaced.

    Raises:
        DestinationExistsError: another file of that name is there.
        IntegrityError: a file is not there as it was sent.
        NetworkError: the store refuses.
    """
    # Weights first: a checkpoint in a folder above would take a folder of small files for its own.
    sizes = {name: (folder / name).stat().st_size for name in sorted(names, key=_weights_first)}
    with progress(sum(sizes.values()), "sending") as report, ThreadPoolExecutor(_AT_ONCE) as pool:
        for name, size in sizes.items():
            if size > _SMALL:
                send_one(url, folder, name, report)
        small = [name for name, size in sizes.items() if size <= _SMALL]
        list(pool.map(lambda name: send_one(url, folder, name, report), small))
    store = open_store(url)
    wrong = [name for name, size in sizes.items() if (store.find(name) or (None,))[0] != size]
    if wrong:
        raise IntegrityError(
            f"{store}: not as it was sent: {listed(wrong)}", hint="remove these files there, and run it again"
        )


def send_one(url: str, folder: Path, name: str, report: Callable[[int], object] = lambda _: None) -> None:
    """Send one file, or see that the same bytes are there already. Raises what `send` does."""
    store, path = open_store(url), folder / name
    if store.find(name) is None:
        try:
            store.put(path, name, report)
            return
        except FileExistsError:  # we sent it before and lost the answer, or it is another's
            store = open_store(url)
    if not store.holds(path, name):
        raise DestinationExistsError(
            f"{store}: holds another {printable(name)}", hint="remove it, or choose another name"
        )
    report(path.stat().st_size)

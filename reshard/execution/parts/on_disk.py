"""Parts on a disk. `OUT.parts` has a folder for each part that is done, until they are finished.

Finishing moves their files into one folder there, and then that to OUT. All that two machines can do there at once is a
rename of the same file to the same path, so nothing depends on locks.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...checkpoint.source import MANIFEST_NAME
from ...errors import DestinationExistsError, IntegrityError, StorageError
from ...files.digest import digest_of
from ...files.system import by_errno
from ...process import Advance
from ...resharded.manifest import Manifest, manifest_at, read_manifest
from ...resharded.rank_file import FileRecord, check_file
from ...storage.disk import make_folders, renamed, sync_file, sync_folder, write_file
from ...text import listed, printable
from ..destination import Destination, destination
from ..staging import discard_folder, discard_refused
from .record import DRAFT_NAME, RECORD_NAME, PartRecord, read_record
from .share import Part

__all__ = ["OnDisk"]

_PART = re.compile(r"part-(\d{5})-of-(\d{5})")
_OURS = re.compile(rf"{_PART.pattern}(\..*)?|files|\.?manifest-[0-9a-f]{{8}}(\.part)?")  # in `OUT.parts`


@dataclass(frozen=True, slots=True)
class _Once:
    """The destination of a part's folder, unless the same part is there by then: one of two runs is enough."""

    inner: Destination
    there: Callable[[], bool]
    sync: bool

    @property
    def local(self) -> Path:
        return self.inner.local

    def check(self) -> None:
        if not self.there():
            self.inner.check()

    def try_out(self) -> None:
        self.inner.try_out()

    def commit(self, folder: Path) -> None:
        try:
            self.inner.commit(folder)
        except DestinationExistsError:
            if not self.there():
                raise
        if self.sync:
            sync_folder(self.local.parent.parent)  # a run that failed may have removed OUT.parts, and ours made it anew


@dataclass(frozen=True, slots=True)
class OnDisk:
    out: Path
    sync: bool

    @property
    def folder(self) -> Path:
        return self.out.with_name(self.out.name + ".parts")

    @property
    def place(self) -> str:
        return printable(self.out)

    @property
    def name(self) -> str:
        return printable(self.folder)

    @property
    def _files(self) -> Path:
        """The folder that becomes the destination."""
        return self.folder / "files"

    @property
    def is_read_again(self) -> bool:
        return True

    def stage(self, part: Part) -> Destination:
        path = self.folder / part.name
        return _Once(destination(path, sync=self.sync), lambda: os.path.lexists(path), self.sync)

    def records(self) -> dict[Part, PartRecord]:
        found = {}
        for name in sorted(self._listed()):
            if match := _PART.fullmatch(name):
                path = self.folder / name / RECORD_NAME
                raw = _read(path)
                if raw is None or not os.path.lexists(path.with_name(DRAFT_NAME)):
                    continue  # it is removed meanwhile, or was by half
                record = read_record(raw, where=printable(path))
                if record.part != Part(int(match[1]), int(match[2])):
                    raise IntegrityError(f"{printable(path)}: is the record of {record.part}")
                found[record.part] = record
        return found

    def _listed(self) -> list[str]:
        self._check_names()
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"{self.name}: {error.strerror}") from None

    def _check_names(self) -> None:
        """Refuse what is called `OUT.parts` and is no folder, and a name too long for what comes beside the folder."""
        if os.path.islink(self.folder) or os.path.isfile(self.folder):
            raise DestinationExistsError(
                f"{self.name}: is in the way: the parts are to be there", hint="remove it, or choose another name"
            )
        try:
            os.lstat(self.out.with_name(f"{self.out.name}.part-{'0' * 16}-{'0' * 8}"))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise by_errno(error, f"{self.place}: {error.strerror}", StorageError) from None

    def draft(self, part: Part) -> Manifest:
        path = self.folder / part.name / DRAFT_NAME
        with _gone(path.parent):
            record = read_record(path.with_name(RECORD_NAME).read_bytes(), where=printable(path.parent))
            if digest_of(path.read_bytes()) != record.draft:
                raise IntegrityError(
                    f"{printable(path)}: is not the draft of {part}", hint="remove that part, and make it again"
                )
            return manifest_at(path)

    def lacks(self, record: PartRecord) -> list[str]:
        # In this order: another run may move a file from the one place to the other meanwhile.
        folders = (self.folder / record.part.name, self._files)
        return [file.name for file in record.records if not any(_size(at / file.name) == file.size for at in folders)]

    def forget(self, part: Part) -> None:
        if os.path.lexists(self.folder / part.name):
            discard_folder(self.folder / part.name, self.folder / part.name, sync=self.sync)

    def whole(self) -> Manifest | None:
        self._check_names()
        if not os.path.lexists(self.out):  # looked for first: the folder appears with its manifest
            return None
        if not os.path.lexists(self.out / MANIFEST_NAME):
            raise DestinationExistsError(
                f"{self.place}: already exists, and is no resharded folder", hint="choose another name"
            )
        return read_manifest(self.out)

    def together(self, records: Sequence[PartRecord]) -> Path:
        with _gone(self._files):
            self._files.mkdir(exist_ok=True)
            for record in records:
                names = [file.name for file in record.records]
                make_folders(self._files, names)
                for name in names:
                    renamed(self.folder / record.part.name / name, self._files / name)  # unless another run has
        return self._files

    def at(self, part: Part) -> str:
        return printable(self.folder / part.name)

    def check(self, record: FileRecord, report: Advance, *, whole: bool = False) -> None:
        folder = self.out if whole else self._files
        with _gone(folder):
            check_file(folder, record, report)

    def complete(self, manifest: Manifest) -> None:
        known = {record.name for record in manifest.files()} | {MANIFEST_NAME}
        with _gone(self._files):
            strange = sorted({path.relative_to(self._files).as_posix() for path in _files_in(self._files)} - known)
            if strange:
                raise IntegrityError(
                    f"{printable(self._files)}: holds what is of no part: {listed(strange)}", hint="move that elsewhere"
                )
            name = f"manifest-{secrets.token_hex(4)}"  # beside the files: nothing else is ever among them
            write_file(self.folder / name, manifest.to_bytes(), sync=self.sync)
            for record in manifest.files() if self.sync else ():  # a part may have been made with --no-sync
                sync_file(self._files / record.name)
            os.rename(self.folder / name, self._files / MANIFEST_NAME)
        destination(self.out, sync=self.sync).commit(self._files)

    def clear(self) -> None:
        names = self._listed()
        if names and all(map(_OURS.fullmatch, names)):  # else there is something of somebody's
            discard_folder(self.folder, self.out, sync=self.sync)
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # if nothing was in it
        self.clear_on()

    def clear_on(self) -> None:
        discard_refused(self.out)


@contextlib.contextmanager
def _gone(folder: Path) -> Iterator[None]:
    """Raise what the system raises inside as an error of ours: another run may have put the folder in its place."""
    try:
        yield
    except OSError as error:
        raise by_errno(error, f"{printable(folder)}: {error.strerror}", IntegrityError) from None


def _files_in(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def _size(path: Path) -> int | None:
    try:
        return os.lstat(path).st_size
    except OSError:
        return None


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise by_errno(error, f"{printable(path)}: cannot be read: {error.strerror}", IntegrityError) from None

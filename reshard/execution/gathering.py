"""Where the parts of a conversion are gathered until it is finished: beside OUT on a disk, or in OUT in a store.

On a disk, `OUT.parts` has a folder for each part that is done. Finishing moves their files into one folder there, then
that to OUT. All that two machines can do there at once is a rename of the same file to the same path, so nothing
depends on locks. In a store the rank files are at their own addresses from the beginning; `reshard.json` comes last.
"""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..checkpoint.source import MANIFEST_NAME
from ..errors import DestinationExistsError, IntegrityError, StorageError, UsageError
from ..files.digest import digest_of
from ..files.system import by_errno
from ..process import Advance, Progress
from ..resharded.manifest import Manifest, manifest_at, read_manifest
from ..resharded.rank_file import FileRecord, check_file, check_streamed
from ..storage.disk import make_folders, renamed, sync_folder, write_file
from ..storage.hub.address import is_hub_url
from ..storage.stores import PROBE_NAME, Store, as_text, cache_folder, is_url, open_store
from ..text import listed, printable
from .destination import Destination, destination, send, send_one
from .journal import JOURNAL_NAME
from .part_record import DRAFT_NAME, RECORD_NAME, PartRecord, read_record
from .parts import Part
from .staging import discard_folder

__all__ = ["Gathering", "gathering"]

_JSON = 1 << 30  # bytes of a record or draft in a store, at most


class Gathering(Protocol):
    """The parts of one destination. Any call raises a ReshardError if it fails."""

    @property
    def place(self) -> str:
        """The destination, as it is printed."""

    @property
    def name(self) -> str:
        """Where the parts are, as it is printed."""

    def stage(self, part: Part) -> Destination:
        """Return the destination of a part's folder, which must hold its record and draft."""

    def records(self) -> dict[Part, PartRecord]:
        """Return the record of every part that is done."""

    def draft(self, part: Part) -> Manifest:
        """Return the draft of the manifest that a part has."""

    def lacks(self, record: PartRecord) -> list[str]:
        """Return the files of a part that are missing, or of another size."""

    def forget(self, part: Part) -> None:
        """Remove what is there of a part, so that it can be made anew."""

    def whole(self) -> Manifest | None:
        """Return the manifest at the destination, None if nothing is there. Raises DestinationExistsError if what is
        there is no resharded folder."""

    def together(self, records: Sequence[PartRecord]) -> Path | None:
        """Bring the files of all parts together. Returns the folder that has them, if it is on this machine."""

    def check(self, record: FileRecord, report: Advance) -> None:
        """Read a file again that is together with the others. Raises IntegrityError if it is not as it was written."""

    def complete(self, manifest: Manifest) -> None:
        """Write the manifest, which makes the destination whole."""

    def clear(self) -> None:
        """Remove what the parts have left."""


def gathering(out: str | Path, *, sync: bool = True, progress: Progress) -> Gathering:
    """Return where the parts of `out` are gathered: a path, or the URL of a store. Raises UsageError for the Hub."""
    out = as_text(out)
    if is_hub_url(out):
        raise UsageError(
            f"{printable(out)}: is on the Hub", hint="choose a folder, and put that there with: reshard publish"
        )
    return _InStore(out.rstrip("/"), progress) if is_url(out) else _OnDisk(Path(os.path.abspath(out)), sync)


@dataclass(frozen=True, slots=True)
class _Once:
    """The destination of a part's folder, unless the same part is there by then: one of two runs is enough."""

    inner: Destination
    there: Callable[[], bool]

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


@dataclass(frozen=True, slots=True)
class _OnDisk:
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

    def stage(self, part: Part) -> Destination:
        path = self.folder / part.name
        return _Once(destination(path, sync=self.sync), lambda: os.path.lexists(path))

    def records(self) -> dict[Part, PartRecord]:
        found = {}
        for name in sorted(self._listed()):
            if match := re.fullmatch(r"part-(\d{5})-of-(\d{5})", name):
                path = self.folder / name / RECORD_NAME
                record = read_record(_read(path), where=printable(path))
                if record.part != Part(int(match[1]), int(match[2])):
                    raise IntegrityError(f"{printable(path)}: is the record of {record.part}")
                found[record.part] = record
        return found

    def _listed(self) -> list[str]:
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"{self.name}: {error.strerror}") from None

    def draft(self, part: Part) -> Manifest:
        return manifest_at(self.folder / part.name / DRAFT_NAME)

    def _path(self, part: Part, name: str) -> Path:
        """Return where a file of a part is: in its folder, or with the others already."""
        path = self.folder / part.name / name
        return path if os.path.lexists(path) else self._files / name

    def lacks(self, record: PartRecord) -> list[str]:
        return [file.name for file in record.records if _size(self._path(record.part, file.name)) != file.size]

    def forget(self, part: Part) -> None:
        discard_folder(self.folder / part.name, self.folder / part.name)

    def whole(self) -> Manifest | None:
        if os.path.lexists(self.out / MANIFEST_NAME):
            return read_manifest(self.out)
        if os.path.lexists(self.out):
            raise DestinationExistsError(
                f"{self.place}: already exists, and is no resharded folder", hint="choose another name"
            )
        return None

    def together(self, records: Sequence[PartRecord]) -> Path:
        try:
            self._files.mkdir(exist_ok=True)
            for record in records:
                names = [file.name for file in record.records]
                make_folders(self._files, names)
                for name in names:
                    renamed(self.folder / record.part.name / name, self._files / name)  # unless another run has
        except OSError as error:
            raise by_errno(error, f"{printable(self._files)}: {error.strerror}", IntegrityError) from None
        return self._files

    def check(self, record: FileRecord, report: Advance) -> None:
        check_file(self._files, record, report)

    def complete(self, manifest: Manifest) -> None:
        known = {record.name for record in manifest.files()} | {MANIFEST_NAME}
        strange = sorted({path.relative_to(self._files).as_posix() for path in _files_in(self._files)} - known)
        if strange:
            raise IntegrityError(f"{printable(self._files)}: holds what is of no part: {listed(strange)}")
        name = f"manifest-{secrets.token_hex(4)}"  # beside the files: nothing else is ever among them
        write_file(self.folder / name, manifest.to_bytes(), sync=self.sync)
        try:
            os.rename(self.folder / name, self._files / MANIFEST_NAME)
        except OSError as error:
            raise by_errno(error, f"{printable(self._files)}: {error.strerror}", IntegrityError) from None
        destination(self.out, sync=self.sync).commit(self._files)

    def clear(self) -> None:
        if os.path.lexists(self.folder):
            discard_folder(self.folder, self.out)
            if self.sync:
                sync_folder(self.out.parent)


def _files_in(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def _size(path: Path) -> int | None:
    try:
        return os.lstat(path).st_size
    except OSError:
        return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise by_errno(error, f"{printable(path)}: cannot be read: {error.strerror}", IntegrityError) from None


@dataclass(frozen=True, slots=True)
class _PartInStore:
    """The destination of a part's files in a store: the draft is sent first, the record last."""

    url: str
    part: Part
    progress: Progress

    @property
    def local(self) -> Path:
        return cache_folder() / "unfinished" / digest_of(f"{self.url} {self.part}".encode())

    def check(self) -> None:
        store = open_store(self.url)
        files = store.files.keys() - {PROBE_NAME, MANIFEST_NAME}
        if files and not any(_DRAFT.fullmatch(name) for name in files):
            raise DestinationExistsError(
                f"{store}: holds files of something else: {listed(sorted(files))}", hint="choose another name"
            )

    def try_out(self) -> None:
        open_store(self.url).try_out()

    def commit(self, folder: Path) -> None:
        record, draft = f".reshard-{self.part.name}.json", _draft_name(_read(folder / DRAFT_NAME))
        os.replace(folder / RECORD_NAME, folder / record)
        os.replace(folder / DRAFT_NAME, folder / draft)
        names = {path.relative_to(folder).as_posix() for path in _files_in(folder)} - {JOURNAL_NAME, record, draft}
        send_one(self.url, folder, draft)
        send(self.url, folder, names, self.progress)
        send_one(self.url, folder, record)


_RECORD = re.compile(r"\.reshard-part-(\d{5})-of-(\d{5})\.json")
_DRAFT = re.compile(r"\.reshard-draft-[0-9a-f]{32}\.json")


def _draft_name(draft: bytes) -> str:
    return f".reshard-draft-{digest_of(draft)}.json"


@dataclass(frozen=True, slots=True)
class _InStore:
    url: str
    progress: Progress

    @property
    def place(self) -> str:
        return printable(self.url)

    @property
    def name(self) -> str:
        return printable(self.url)

    def stage(self, part: Part) -> Destination:
        return _PartInStore(self.url, part, self.progress)

    def records(self) -> dict[Part, PartRecord]:
        store, found = open_store(self.url), {}
        for name in sorted(store.files):
            if match := _RECORD.fullmatch(name):
                record = read_record(_fetched(store, name), where=f"{store}/{name}")
                if record.part != Part(int(match[1]), int(match[2])):
                    raise IntegrityError(f"{store}/{name}: is the record of {record.part}")
                found[record.part] = record
        return found

    def draft(self, part: Part) -> Manifest:
        store, record = open_store(self.url), self.records()[part]
        return _manifest(store, f".reshard-draft-{record.draft}.json")

    def lacks(self, record: PartRecord) -> list[str]:
        store = open_store(self.url)
        return [file.name for file in record.records if (store.find(file.name) or (None,))[0] != file.size]

    def forget(self, part: Part) -> None:
        pass  # what is there is compared with what is sent

    def whole(self) -> Manifest | None:
        store = open_store(self.url)
        return _manifest(store, MANIFEST_NAME) if store.find(MANIFEST_NAME) else None

    def together(self, records: Sequence[PartRecord]) -> None:
        """The files are together from the beginning."""

    def check(self, record: FileRecord, report: Advance) -> None:
        store = open_store(self.url)
        check_streamed(record, lambda start, end: store.read(record.name, start, end), report, where=f"{store}")

    def complete(self, manifest: Manifest) -> None:
        known = {record.name for record in manifest.files()} | {MANIFEST_NAME, PROBE_NAME}
        there = open_store(self.url).files
        strange = sorted(name for name in there.keys() - known if not _ours(name))
        if strange:
            raise IntegrityError(f"{self.name}: holds what is of no part: {listed(strange)}")
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, MANIFEST_NAME).write_bytes(manifest.to_bytes())
            send_one(self.url, Path(folder), MANIFEST_NAME)

    def clear(self) -> None:
        store = open_store(self.url)
        for name in filter(_ours, store.files):
            store.remove(name)


def _ours(name: str) -> bool:
    return bool(_RECORD.fullmatch(name) or _DRAFT.fullmatch(name))


def _fetched(store: Store, name: str) -> bytes:
    size = store.entries([name])[0].size
    if size > _JSON:
        raise IntegrityError(f"{store}: {printable(name)} is too large for what it is called")
    return store.read(name, 0, size)


def _manifest(store: Store, name: str) -> Manifest:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(_fetched(store, name))
        return manifest_at(path)

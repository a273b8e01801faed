"""Parts in a store. The rank files are at their own addresses from the beginning, each part's record beside them.

`reshard.json` comes last, and the records are removed then.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...checkpoint.source import MANIFEST_NAME
from ...errors import DestinationExistsError, IntegrityError
from ...files.digest import digest_of
from ...process import Advance, Progress
from ...resharded.manifest import Manifest, manifest_at
from ...resharded.rank_file import FileRecord, check_streamed
from ...storage.stores import PROBE_NAME, Store, cache_folder, open_store
from ...text import listed, printable
from ..destination import Destination, send, send_one
from ..journal import JOURNAL_NAME
from .record import DRAFT_NAME, RECORD_NAME, PartRecord, read_record
from .share import Part

__all__ = ["InStore"]

_JSON = 1 << 30  # bytes of a record or draft, at most


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
        files = store.files.keys() - {PROBE_NAME}
        if files and MANIFEST_NAME not in files and not any(map(_DRAFT.fullmatch, files)):
            raise DestinationExistsError(
                f"{store}: holds files of something else: {listed(sorted(files))}", hint="choose another name"
            )

    def try_out(self) -> None:
        open_store(self.url).try_out()

    def commit(self, folder: Path) -> None:
        record, draft = _record_name(self.part), _draft_name((folder / DRAFT_NAME).read_bytes())
        os.replace(folder / RECORD_NAME, folder / record)
        os.replace(folder / DRAFT_NAME, folder / draft)
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        send_one(self.url, folder, draft)
        send(self.url, folder, names - {JOURNAL_NAME, record, draft}, self.progress)
        send_one(self.url, folder, record)


_RECORD = re.compile(r"\.reshard-part-(\d{5})-of-(\d{5})\.json")
_DRAFT = re.compile(r"\.reshard-draft-[0-9a-f]{32}\.json")


def _record_name(part: Part) -> str:
    return f".reshard-{part.name}.json"


def _draft_name(draft: bytes) -> str:
    return f".reshard-draft-{digest_of(draft)}.json"


@dataclass(frozen=True, slots=True)
class InStore:
    url: str
    progress: Progress

    @property
    def place(self) -> str:
        return printable(self.url)

    @property
    def name(self) -> str:
        return printable(self.url)

    @property
    def is_read_again(self) -> bool:
        return False

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

    def at(self, part: Part) -> str:
        return f"{self.name}/{_record_name(part)}"

    def check(self, record: FileRecord, report: Advance, *, whole: bool = False) -> None:
        store = open_store(self.url)
        check_streamed(record, lambda start, end: store.read(record.name, start, end), report, where=f"{store}")

    def complete(self, manifest: Manifest) -> None:
        known = {record.name for record in manifest.files()} | {MANIFEST_NAME, PROBE_NAME}
        there = open_store(self.url).files
        strange = sorted(name for name in there.keys() - known if not _ours(name))
        if strange:
            raise IntegrityError(
                f"{self.name}: holds what is of no part: {listed(strange)}", hint="move that elsewhere"
            )
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, MANIFEST_NAME).write_bytes(manifest.to_bytes())
            send_one(self.url, Path(folder), MANIFEST_NAME)

    def clear(self) -> None:
        store = open_store(self.url)
        for name in filter(_RECORD.fullmatch, store.files):  # while there is a record, its draft is there
            store.remove(name)
        self.clear_on()

    def clear_on(self) -> None:
        store = open_store(self.url)
        for name in () if any(map(_RECORD.fullmatch, store.files)) else filter(_DRAFT.fullmatch, store.files):
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

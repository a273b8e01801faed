"""A checkpoint that is elsewhere: its headers are read by ranges, its files fetched one by one when needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from ..checkpoint.companions import Item
from ..checkpoint.source import MANIFEST_NAME, Elsewhere, Source, SourceFile, open_source, weights_of
from ..checkpoint.weights import AS_FOUND, Choice, Weights
from ..errors import BadInputError, IntegrityError
from ..files.header import Header, header_length, parse_header
from ..files.untrusted import check_plain_name
from ..resharded.rank_file import FileRecord, check_rank_header
from ..text import printable
from .disk import discard

__all__ = [
    "Away",
    "Entry",
    "GivenUp",
    "Remote",
    "headers_of_absent",
    "lacking",
    "never",
    "open_remote",
    "read_headers",
    "remote_files",
    "remote_weights",
    "sha256_of",
]

_AT_ONCE = 8  # requests
_FIRST_BYTES = 16 << 10  # most headers are shorter
_HASHED_AT_ONCE = 4 << 20


GivenUp = Callable[[], bool]


def never() -> bool:
    """That nothing is given up."""
    return False


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that is elsewhere: its size in bytes, and its SHA-256 where that is known there."""

    name: str
    size: int
    sha256: str | None


def lacking(place: object, name: str) -> BadInputError:
    """The error to raise where a place has no file of that name."""
    return BadInputError(f"{place}: has no {printable(name)}")


class Away(Protocol):
    """A folder that is elsewhere, in one version. Any call raises a ReshardError where it cannot be done."""

    @property
    def version(self) -> str:
        """What tells it from any other state of the folder."""

    def items(self) -> Iterable[Item]:
        """All its files, those of the folders in it too where something of them can belong to it."""

    def entries(self, names: Sequence[str]) -> list[Entry]:
        """Each of some files, by path, which all must be there."""

    def read(self, name: str, start: int, end: int) -> bytes:
        """The bytes from `start` to `end` of a file."""

    def get(self, name: str, folder: Path | None, given_up: GivenUp = never) -> Path:
        """Fetch a file whole, into `folder`, or the cache where that is None. InterruptedError once it is given up."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A checkpoint that is elsewhere. `digests` are the SHA-256 of those of its files of which one is known; the files
    of `cached` are in the cache already."""

    source: Source
    away: Away
    digests: dict[str, str]
    cached: frozenset[str]

    def fetch(self, name: str, given_up: GivenUp = never, *, folder: Path | None) -> Path:
        """One file, whole, into `folder`, or the cache where that is None.

        Raises:
            InterruptedError: the work was given up meanwhile.
            NetworkError: it does not come.
            IntegrityError: what came is not what is there; it is not kept.
        """
        file = self.source.file(name)
        if name in self.cached:
            return file.path
        path = self.away.get(name, folder, given_up)
        expected = self.digests.get(name)
        if path.stat().st_size != file.size or (expected and sha256_of(path) != expected):
            discard(path)
            damaged = IntegrityError(
                f"{self.away}: {printable(name)} did not arrive intact", hint="try again: it is fetched anew"
            )
            damaged.lost = False  # nothing was made of it
            raise damaged
        return path


def remote_weights(root: Path, away: Away, items: Iterable[Item], choice: Choice = AS_FOUND) -> Weights:
    """Where the weights are of the checkpoint `away` whose small files are in `root`, and which consists of `items`.

    An index that is not in `root` yet is fetched. Raises NetworkError, and what `weights_of` does.
    """

    def fetch(name: str) -> None:
        if not (root / name).exists():
            away.get(name, None)

    return weights_of(root, [item.path for item in items], place=away, choice=choice, fetch=fetch)


def open_remote(
    root: Path,
    away: Away,
    items: Sequence[Item],
    *,
    choice: Choice = AS_FOUND,
    repo_id: str | None,
    commit: str | None,
    include: Sequence[str] = (),
) -> Remote:
    """The checkpoint `away` whose small files are in `root` already: of others, only headers are read. `items` are all
    its files; `choice` and `include` are those of `open_source`.

    Raises:
        NetworkError: there is no answer.
        BadInputError: as `open_source`.
    """
    weights = remote_weights(root, away, items, choice)
    cached = frozenset(name for name in weights.files if (root / name).exists())
    absent = away.entries([name for name in weights.files if name not in cached])
    files = {
        entry.name: SourceFile(entry.name, root / entry.name, entry.size, 0, header)
        for entry, header in zip(absent, read_headers(away, absent))
    }
    elsewhere = Elsewhere(weights, items, files, away.read)
    source = open_source(root, choice=choice, repo_id=repo_id, commit=commit, include=include, elsewhere=elsewhere)
    return Remote(source, away, _digests(absent), cached)


def remote_files(source: Source, away: Away) -> Remote:
    """A source whose headers have been read, and whose files are `away` where they are not in the cache.

    Raises:
        NetworkError: there is no answer.
        BadInputError: a file is not there.
    """
    cached = frozenset(file.name for file in source.files if file.path.exists())
    absent = away.entries([file.name for file in source.files if file.name not in cached])
    return Remote(source, away, _digests(absent), cached)


def _digests(entries: Sequence[Entry]) -> dict[str, str]:
    return {entry.name: entry.sha256 for entry in entries if entry.sha256}


def read_headers(away: Away, entries: Sequence[Entry]) -> list[Header]:
    """The headers of safetensors files, by ranges. Raises BadInputError where one is not such a file."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(partial(_read_header, away), entries))


def _read_header(away: Away, entry: Entry) -> Header:
    first = away.read(entry.name, 0, min(_FIRST_BYTES, entry.size))
    end = 8 + header_length(first, file=entry.name, file_size=entry.size)
    if end > len(first):
        first += away.read(entry.name, len(first), end)
    return parse_header(first[8:end], file=entry.name, file_size=entry.size)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASHED_AT_ONCE))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def headers_of_absent(folder: Path, away: Away, records: Sequence[FileRecord]) -> dict[str, Header]:
    """The headers of those rank files that are not in the folder, read by ranges.

    Raises:
        IntegrityError: a file is not there either, or is not the one that was written.
        NetworkError: there is no answer.
    """
    absent = {record.name: record for record in records if not os.path.lexists(folder / record.name)}
    for name in absent:
        check_plain_name(name, what=MANIFEST_NAME)
    try:
        entries = away.entries(list(absent))
    except BadInputError as error:  # there is none of a name that the manifest has
        raise IntegrityError(error.message) from None
    for entry in entries:
        if entry.size != absent[entry.name].size:
            raise IntegrityError(
                f"{away}: {printable(entry.name)}: expected {absent[entry.name].size} bytes, got {entry.size}"
            )
    try:
        headers = dict(zip(absent, read_headers(away, entries)))
    except BadInputError as error:
        raise IntegrityError(error.message) from None
    for name, header in headers.items():
        check_rank_header(folder / name, absent[name], header)
    return headers

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
from ..errors import BadInputError, IntegrityError, StorageError
from ..files.header import Header, header_length, parse_header
from ..files.untrusted import check_plain_name
from ..resharded.rank_file import FileRecord, check_rank_header
from ..text import printable
from .disk import discard, pwrite

__all__ = [
    "Away",
    "Entry",
    "GivenUp",
    "Remote",
    "Span",
    "Spans",
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
_PIECE = 8 << 20  # bytes of one request
_SOME = ".some"  # ends the name of a file that is here with holes
_FIRST_BYTES = 16 << 10  # most headers are shorter
_HASHED_AT_ONCE = 4 << 20


GivenUp = Callable[[], bool]
Span = tuple[int, int]  # the bytes of a file from the first number to the second
Spans = dict[str, tuple[Span, ...]]  # by file


def never() -> bool:
    """Never give up."""
    return False


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that is elsewhere: its size in bytes, and its SHA-256 if it is known there."""

    name: str
    size: int
    sha256: str | None


def lacking(place: object, name: str) -> BadInputError:
    """Return the error to raise if a place has no file of that name."""
    return BadInputError(f"{place}: has no {printable(name)}")


class Away(Protocol):
    """A folder that is elsewhere, in one version. Any call raises a ReshardError if it fails."""

    @property
    def version(self) -> str:
        """An identifier of this state of the folder."""

    def items(self) -> Iterable[Item]:
        """Return all its files; those of a subfolder only if some of them can belong to the checkpoint."""

    def entries(self, names: Sequence[str]) -> list[Entry]:
        """Return an entry for each of these files, by path; all of them must be there."""

    def read(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` to `end` of a file."""

    def get(self, name: str, folder: Path | None, given_up: GivenUp = never) -> Path:
        """Fetch a whole file into `folder`, or the cache if that is None. Raises InterruptedError if given up."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A checkpoint that is elsewhere. `cached` names its files that are in the cache already.

    `digests` are the SHA-256 of its files, as far as they are known.
    """

    source: Source
    away: Away
    digests: dict[str, str]
    cached: frozenset[str]

    def fetch(self, name: str, given_up: GivenUp = never, *, folder: Path | None) -> Path:
        """Fetch a whole file into `folder`, or the cache if that is None. A cached one is used as it is.

        Raises:
            InterruptedError: the work was given up meanwhile.
            NetworkError: the file does not come.
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
            damaged.lost = False  # nothing was made from it
            raise damaged
        return path

    def fetch_spans(self, name: str, spans: Sequence[Span], given_up: GivenUp = never, *, folder: Path) -> Path:
        """Fetch some bytes of a file into `folder`: a file of its full size, with holes. A cached one is used as it is.

        What comes cannot be checked by itself: the digest of a file is that of all its bytes.

        Raises:
            InterruptedError: the work was given up meanwhile.
            NetworkError: the bytes do not come.
            StorageError: the disk refuses.
        """
        file = self.source.file(name)
        if name in self.cached:
            return file.path
        path = folder / f"{name}{_SOME}"

        def piece(fd: int, start: int, end: int) -> None:
            if given_up():
                raise InterruptedError
            pwrite(fd, memoryview(self.away.read(name, start, end)), start)

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                os.ftruncate(fd, file.size)
                pieces = [(at, min(at + _PIECE, end)) for start, end in spans for at in range(start, end, _PIECE)]
                pool = ThreadPoolExecutor(_AT_ONCE)
                try:
                    for done in [pool.submit(piece, fd, *bounds) for bounds in pieces]:
                        done.result()
                finally:
                    pool.shutdown(cancel_futures=True)
            finally:
                os.close(fd)
        except InterruptedError:
            raise
        except OSError as error:
            raise StorageError(f"{printable(path)}: {error.strerror}") from None
        return path


def remote_weights(root: Path, away: Away, items: Iterable[Item], choice: Choice = AS_FOUND) -> Weights:
    """Return where the weights of the checkpoint `away` are. `items` are all its files, `root` has the small ones.

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
    """Open the checkpoint `away` whose small files are in `root` already: of others, only headers are read.

    `items` are all its files; `choice` and `include` are those of `open_source`.

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
    """Return a source, its headers read already, with the files `away` that are not in the cache.

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
    """Read the headers of safetensors files by ranges. Raises BadInputError if a file is not safetensors."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(partial(_read_header, away), entries))


def _read_header(away: Away, entry: Entry) -> Header:
    first = away.read(entry.name, 0, min(_FIRST_BYTES, entry.size))
    end = 8 + header_length(first, file=entry.name, file_size=entry.size)
    if end > len(first):
        first += away.read(entry.name, len(first), end)
    return parse_header(first[8:end], file=entry.name, file_size=entry.size)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASHED_AT_ONCE))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def headers_of_absent(folder: Path, away: Away, records: Sequence[FileRecord]) -> dict[str, Header]:
    """Read by ranges the headers of those rank files that are not in the folder.

    Raises:
        IntegrityError: a file is not elsewhere either, or is not the one that was written.
        NetworkError: there is no answer.
    """
    absent = {record.name: record for record in records if not os.path.lexists(folder / record.name)}
    for name in absent:
        check_plain_name(name, what=MANIFEST_NAME)
    try:
        entries = away.entries(list(absent))
    except BadInputError as error:  # a file that the manifest names is not there
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

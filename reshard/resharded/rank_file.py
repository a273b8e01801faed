"""Checks of one file of a resharded folder: it exists, its header fits the manifest, its bytes are as written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.source import MANIFEST_NAME
from ..errors import BadInputError, IntegrityError
from ..files.digest import digest_file, digest_of, new_digest, tree_digest
from ..files.header import Header, TensorInfo, header_length, parse_header, read_header
from ..files.mapped import MappedFile
from ..files.untrusted import vetted_path
from ..process import Advance
from ..text import listed, printable

__all__ = [
    "Digests",
    "FileRecord",
    "check_digests",
    "check_file",
    "check_rank_header",
    "check_streamed",
    "largest_first",
    "read_rank_header",
    "written_file",
]

_PIECE = 8 << 20  # bytes read at a time from elsewhere


_DIGITS = 32  # of a digest


class Digests(Mapping[str, str]):
    """The digests of a file's tensors, of which `text` has one after the other, in the order of `names`.

    They are told apart when one is asked for: a rank asks for those of its own file only. Raises ValueError if the two
    do not fit.
    """

    def __init__(self, names: tuple[str, ...], text: str) -> None:
        if len(text) != _DIGITS * len(names):
            raise ValueError(f"{len(text)} digits for {len(names)} tensors")
        self._names, self._text = names, text
        self._found: dict[str, str] | None = None

    def _all(self) -> dict[str, str]:
        if self._found is None:
            starts = range(0, len(self._text), _DIGITS)
            self._found = {name: self._text[at : at + _DIGITS] for name, at in zip(self._names, starts)}
        return self._found

    def __getitem__(self, name: str) -> str:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return repr(self._all())


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file that was written: its size in bytes, its digest, and the digest of each of its tensors if it holds any."""

    name: str
    size: int
    digest: str
    tensors: Mapping[str, str]


def written_file(folder: Path, record: FileRecord) -> Path:
    """Return the path of a file of a resharded folder. Raises IntegrityError if it is missing, or of another size."""
    path = folder / record.name
    if not os.path.lexists(path):
        raise IntegrityError(f"{printable(path)}: is missing")
    real = vetted_path(folder, record.name, what=MANIFEST_NAME)
    size = os.stat(real).st_size
    if size != record.size:
        raise IntegrityError(f"{printable(path)}: expected {record.size} bytes, got {size}")
    return path  # not what it links to: the cache's names say nothing


def read_rank_header(path: Path, record: FileRecord) -> Header:
    """Read the file's header. Raises IntegrityError if it does not hold the tensors of its record."""
    try:
        header = read_header(path, file=record.name)
    except BadInputError as error:
        raise IntegrityError(error.message) from None
    check_rank_header(path, record, header)
    return header


def check_rank_header(path: Path, record: FileRecord, header: Header) -> None:
    """Raise IntegrityError if the header of a file, which is or will be at `path`, does not fit its record."""
    wrong = sorted({info.name for info in header.tensors} ^ record.tensors.keys())
    if wrong:
        names = listed(wrong)
        raise IntegrityError(f"{printable(path)}: does not hold the tensors that were written: {names}")


def largest_first(header: Header) -> list[TensorInfo]:
    """Return the tensors in the order that keeps threads busy to the end, one tensor each."""
    return sorted(header.tensors, key=lambda info: -info.nbytes)


def check_digests(path: Path, record: FileRecord, header: Header, found: Mapping[str, str]) -> None:
    """Raise IntegrityError, naming the tensor or the header, if the digests found are not those of the record."""
    for info in header.tensors:
        if found[info.name] != record.tensors[info.name]:
            raise IntegrityError(
                f"{printable(path)}: tensor {printable(info.name)} was altered",
                hint="fetch or convert it again",
            )
    if tree_digest(header.head, (found[info.name] for info in header.tensors)) != record.digest:
        raise IntegrityError(f"{printable(path)}: its header was altered")


def check_file(folder: Path, record: FileRecord, report: Advance = lambda _: None) -> None:
    """Check every byte of one file of a resharded folder; `report` is told of the bytes.

    Raises IntegrityError, which names the tensor if one was altered.
    """
    path = written_file(folder, record)
    if not record.tensors and not record.name.endswith(".safetensors"):
        if digest_file(path) != record.digest:
            raise IntegrityError(f"{printable(path)}: its content was altered")
        report(record.size)
        return
    with MappedFile(path, size=record.size) as mapped:
        header = read_rank_header(path, record)
        found = {}
        for info in header.tensors:
            found[info.name] = digest_of(mapped.data[info.start : info.end])
            report(info.nbytes)
        check_digests(path, record, header, found)
        report(record.size - sum(info.nbytes for info in header.tensors))


def check_streamed(
    record: FileRecord, read: Callable[[int, int], bytes], report: Advance = lambda _: None, *, where: str
) -> None:
    """Check every byte of a file that is elsewhere, as `check_file` does; `read` gives its bytes, from and to.

    Raises IntegrityError, which names the tensor if one was altered.
    """
    path = Path(where) / record.name
    if not record.name.endswith(".safetensors"):
        if _streamed_digest(read, 0, record.size, report) != record.digest:
            raise IntegrityError(f"{printable(path)}: its content was altered")
        return
    try:
        end = 8 + header_length(read(0, min(8, record.size)), file=record.name, file_size=record.size)
        header = parse_header(read(8, end), file=record.name, file_size=record.size)
    except BadInputError as error:
        raise IntegrityError(error.message) from None
    check_rank_header(path, record, header)
    found = {info.name: _streamed_digest(read, info.start, info.end, report) for info in header.tensors}
    check_digests(path, record, header, found)
    report(record.size - sum(info.nbytes for info in header.tensors))


def _streamed_digest(read: Callable[[int, int], bytes], start: int, end: int, report: Advance) -> str:
    digest = new_digest()
    for at in range(start, end, _PIECE):
        piece = read(at, min(at + _PIECE, end))
        digest.update(piece)
        report(len(piece))
    return digest.hexdigest()

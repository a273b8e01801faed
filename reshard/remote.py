"""A checkpoint that stays on the Hub: its headers are read by ranges, its files fetched one by one when needed."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .errors import BadInputError, IntegrityError, NetworkError, printable
from .header import Header, header_length, parse_header
from .hub import Place, client, discard
from .hub_errors import explain
from .source import Source, SourceFile, check_plain_name, open_source, weight_files

__all__ = ["Remote", "open_remote"]

_AT_ONCE = 8  # requests
_ATTEMPTS = 3
_FIRST_BYTES = 16 << 10  # most headers are shorter
_HASHED_AT_ONCE = 4 << 20


@dataclass(frozen=True, slots=True)
class Remote:
    """A checkpoint of the Hub at one commit. `digests` are the SHA-256 of those of its files that the Hub gives one
    for; the files of `cached` are in its cache already."""

    source: Source
    place: Place
    digests: dict[str, str]
    cached: frozenset[str]

    def fetch(self, name: str, folder: Path | None) -> Path:
        """One file, whole, into `folder`, or the cache where that is None.

        Raises:
            NetworkError: it does not come.
            IntegrityError: what came is not what the Hub has; it is not kept.
        """
        file = self.source.file(name)
        if name in self.cached:
            return file.path
        from huggingface_hub import hf_hub_download

        client()
        try:
            path = Path(
                hf_hub_download(
                    self.place.repo_id, self.place.inside(name), revision=self.source.commit, local_dir=folder
                )
            )
        except Exception as error:  # which may only say that it is not in the cache either
            raise explain(error.__cause__ or error, str(self.place), revision=self.source.commit) from None
        expected = self.digests.get(name)
        if path.stat().st_size != file.size or (expected and _sha256(path) != expected):
            discard(path)
            raise IntegrityError(
                f"{self.place}: {printable(name)} is not what the Hub has",
                hint="try again: it is fetched anew",
            )
        return path


def open_remote(root: Path, place: str, commit: str) -> Remote:
    """The checkpoint at a place of the Hub, whose small files are in `root` already: of others, only headers are read.

    Raises:
        NetworkError: the Hub does not answer.
        BadInputError: as `open_source`.
    """
    where = Place.parse(place)
    names = weight_files(root)
    for name in names:
        check_plain_name(name, what="source file")
    cached = frozenset(name for name in names if (root / name).exists())
    absent = _entries(where, commit, [name for name in names if name not in cached])
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        headers = list(pool.map(partial(_read_header, where, commit), absent))
    files = {
        entry.name: SourceFile(entry.name, root / entry.name, entry.size, 0, header)
        for entry, header in zip(absent, headers)
    }
    source = open_source(root, repo_id=place, commit=commit, absent=files)
    return Remote(source, where, {entry.name: entry.sha256 for entry in absent if entry.sha256}, cached)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file of the repo: its size in bytes, and its SHA-256 where the Hub gives one."""

    name: str
    size: int
    sha256: str | None


def _entries(where: Place, commit: str, names: Sequence[str]) -> list[_Entry]:
    if not names:
        return []
    from huggingface_hub import HfApi

    client()
    try:
        infos = HfApi().get_paths_info(where.repo_id, [where.inside(name) for name in names], revision=commit)
    except Exception as error:
        raise explain(error, str(where), revision=commit) from None
    found = {info.path: info for info in infos}
    entries = []
    for name in names:
        info = found.get(where.inside(name))
        if info is None or not hasattr(info, "size"):  # a folder can have such a name too
            raise BadInputError(f"{where}: the repo has no {printable(name)}", hint="only safetensors files are read")
        entries.append(_Entry(name, info.size, info.lfs.sha256 if info.lfs else None))
    return entries


def _read_header(where: Place, commit: str, entry: _Entry) -> Header:
    first = _read_range(where, commit, entry.name, 0, min(_FIRST_BYTES, entry.size))
    end = 8 + header_length(first, file=entry.name, file_size=entry.size)
    if end > len(first):
        first += _read_range(where, commit, entry.name, len(first), end)
    return parse_header(first[8:end], file=entry.name, file_size=entry.size)


def _read_range(where: Place, commit: str, name: str, start: int, end: int) -> bytes:
    """The bytes from `start` to `end` of a file. Raises NetworkError."""
    if start == end:
        return b""
    for _ in range(_ATTEMPTS):
        try:
            found = _ask(where, commit, name, start, end)
        except Exception as error:
            raise explain(error, str(where), revision=commit) from None
        if len(found) == end - start:
            return found
    raise NetworkError(f"{where}: {printable(name)}: the connection breaks", hint="try again")


def _ask(where: Place, commit: str, name: str, start: int, end: int) -> bytes:
    """What comes of the bytes from `start` to `end`: fewer where the connection breaks, and no more of the file also
    from a server that would send all of it. The client tries again where the Hub is too busy."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(where.repo_id, where.inside(name), revision=commit)
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    data = bytearray()
    with http_stream_backoff("GET", url, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        skip = start if response.status_code == 200 else 0
        # Not let out of here: the client would take it for a failure to connect, and come back with another answer.
        with contextlib.suppress(Exception):
            for piece in response.iter_bytes():
                data += piece
                if len(data) >= skip + end - start:
                    break
    return bytes(data[skip : skip + end - start])


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASHED_AT_ONCE))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()

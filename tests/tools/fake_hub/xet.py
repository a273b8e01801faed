"""A reader of the files that hf_xet has stored in a folder (`casUrl="local://DIR"`)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

_ENTRY = 48  # bytes of every entry of a shard
_VERIFIED, _EXTENDED = 1 << 31, 1 << 30  # flags of a file


def stored(cas: Path) -> dict[str, tuple[str, int]]:
    """Return the xet hash and the size of the files in the folder, by SHA-256."""
    return dict(found for shard in (cas / "xet" / "xorbs" / "shards").glob("*.mdb") for found in _files(shard))


def _files(shard: Path) -> Iterator[tuple[str, tuple[str, int]]]:
    data = shard.read_bytes()
    position = _ENTRY
    while data[position : position + 32] != b"\xff" * 32:
        flags, count = struct.unpack_from("<II", data, position + 32)
        segments = range(position + _ENTRY, position + _ENTRY * (1 + count), _ENTRY)
        size = sum(struct.unpack_from("<I", data, segment + 36)[0] for segment in segments)
        end = position + _ENTRY * (1 + count * (2 if flags & _VERIFIED else 1))
        if flags & _EXTENDED:
            yield _hex(data[end : end + 32]), (_hex(data[position : position + 32]), size)
            end += _ENTRY
        position = end


def _hex(digest: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))


def read(cas: Path, xet_hash: str, size: int) -> bytes:
    """Return the content of a file."""
    import hf_xet

    path = cas / f"{xet_hash}.read"
    with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{cas}") as group:
        group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(path))
    return path.read_bytes()

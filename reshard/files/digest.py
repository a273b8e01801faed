"""Digests of tensors and files: xxh3-128, written in hex."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from ..errors import IntegrityError
from ..text import printable
from .system import by_errno

__all__ = ["ALGORITHM", "DigestsAhead", "digest_file", "digest_of", "new_digest", "tree_digest"]

ALGORITHM = "xxh3-128"
_BLOCK = 4 << 20


def new_digest() -> Any:
    """Return a digest to be fed in blocks: `update(data)`, then `hexdigest()`."""
    return xxhash.xxh3_128()


def digest_of(data: Any) -> str:
    """Return the digest of one buffer."""
    return xxhash.xxh3_128(data).hexdigest()


def tree_digest(head: bytes, tensor_digests: Iterable[str]) -> str:
    """Return the digest of a safetensors file: over its header bytes, then the digests of its tensors in file order.

    It covers every byte of the file, and the tensors can be digested in any order, by any number of threads.
    """
    whole = xxhash.xxh3_128(head)
    for digest in tensor_digests:
        whole.update(bytes.fromhex(digest))
    return whole.hexdigest()


def digest_file(path: Path) -> str:
    """Return the digest of a file's bytes, read in blocks. Raises IntegrityError if the file is gone, StorageError if
    the system does not let it be read."""
    digest, buffer = new_digest(), memoryview(bytearray(_BLOCK))
    try:
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(buffer):
                digest.update(buffer[:size])
    except OSError as error:
        raise by_errno(error, f"{printable(path)}: cannot be read: {error.strerror}", IntegrityError) from None
    return digest.hexdigest()


class DigestsAhead:
    """Digests of whole files, in order, on a thread of their own, while the work on the files is prepared.

    Reading also puts the files into the page cache. Leaving the context ends the thread after the file under way.
    """

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reshard-ahead")
        self._begun = {name: self._pool.submit(digest_file, path) for name, path in paths.items()}

    def __enter__(self) -> DigestsAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def no_more(self) -> None:
        """Begin no other file: the caller now works on the files and digests them as it reads them."""
        self._begun = {name: digest for name, digest in self._begun.items() if not digest.cancel()}

    def get(self, name: str) -> str | None:
        """Return the digest of a file once it is done, or None if it was not begun. Raises what `digest_file` does."""
        return self._begun[name].result() if name in self._begun else None

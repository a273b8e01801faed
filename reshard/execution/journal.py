"""The journal of an unfinished folder: one line for each tensor that is written, so that an interrupted run can go on.

Lines are appended without waiting for the disk, so after a power loss they can claim more than it holds: a run that
goes on digests what a line claims before believing it. Each line has its own checksum; the first that is torn ends the
reading.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path

from ..errors import StorageError
from ..files.digest import digest_of
from ..text import printable

__all__ = ["JOURNAL_NAME", "Journal"]

JOURNAL_NAME = ".reshard-journal"
_CHECKSUM = 16  # hex digits


class Journal:
    """The journal of one folder. `claimed` is what earlier runs wrote: (file, tensor) → digest."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL_NAME
        self._lock = threading.Lock()
        self.claimed: dict[tuple[str, str], str] = {}
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._fd = os.open(self._path, flags, 0o644)
            try:
                os.ftruncate(self._fd, self._read())
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise StorageError(f"{printable(self._path)}: {error.strerror}") from None

    def _read(self) -> int:
        """Take the whole lines; return the offset where they end."""
        end = 0
        with open(self._path, "rb") as lines:
            for line in lines:
                text, checksum = line[: -_CHECKSUM - 2], line[-_CHECKSUM - 2 :]
                if checksum != _checksum(text):
                    break
                file, tensor, digest = json.loads(text)
                self.claimed[file, tensor] = digest
                end += len(line)
        return end

    def add(self, file: str, tensor: str, digest: str) -> None:
        """Claim a tensor that has been written, from any thread. Raises OSError."""
        text = json.dumps([file, tensor, digest]).encode()
        line = text + _checksum(text)
        with self._lock:
            while line:
                line = line[os.write(self._fd, line) :]

    def close(self) -> None:
        """Let go of the file. If that fails nothing is lost: whoever believes a claim checks it first."""
        with contextlib.suppress(OSError):
            os.close(self._fd)


def _checksum(text: bytes) -> bytes:
    return b" " + digest_of(text)[:_CHECKSUM].encode() + b"\n"

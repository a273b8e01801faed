"""An earlier folder of the same model: tensors whose bytes are the same are copied from its rank files.

The copy is the kernel's own, so that a file system that can shares the blocks of both files, or copies on its server.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from ..resharded.layout import ALIGNMENT
from ..resharded.manifest import Manifest
from ..resharded.rank_file import read_rank_header, written_file
from ..storage.disk import pwrite

__all__ = ["Earlier", "Taken", "open_earlier"]

_NO_COPY = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM)
_BLOCK = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Taken:
    """A tensor of an earlier file: where its bytes are, and the digest that they had when they were written."""

    path: Path
    start: int
    size: int
    digest: str

    def begins_as(self, block: memoryview) -> bool:
        """Whether its first bytes are those of a block; False if they cannot be read."""
        with contextlib.suppress(OSError), open(self.path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), len(block), self.start) == block
        return False

    def copy(self, fd: int, offset: int) -> None:
        """Copy its bytes to an offset of another file. Who uses them digests them there: they may have been altered.

        Raises OSError.
        """
        with open(self.path, "rb", buffering=0) as source:
            # Only whole blocks can be shared: the rest is copied.
            edge = min(self.size, -offset % ALIGNMENT)
            middle = (self.size - edge) // ALIGNMENT * ALIGNMENT
            for at, size in ((0, edge), (edge, middle), (edge + middle, self.size - edge - middle)):
                _copy(source.fileno(), self.start + at, fd, offset + at, size)


def _copy(source: int, start: int, target: int, offset: int, size: int) -> None:
    while size:
        try:
            done = os.copy_file_range(source, target, size, start, offset)
        except OSError as error:
            if error.errno not in _NO_COPY:
                raise
            block = os.pread(source, min(size, _BLOCK), start)
            pwrite(target, memoryview(block), offset)
            done = len(block)
        if not done:  # the file is shorter than it was
            return
        start, offset, size = start + done, offset + done, size - done


class Earlier:
    """The tensors of an earlier folder, by file and name. `copied` are the bytes that were taken over from it."""

    def __init__(self, tensors: dict[tuple[str, str], Taken]) -> None:
        self._tensors = tensors
        self._lock = threading.Lock()
        self.copied = 0

    def count(self, size: int) -> None:
        """Count the bytes of a tensor that was taken over, from any thread."""
        with self._lock:
            self.copied += size

    def find(self, file: str, tensor: str, size: int) -> Taken | None:
        """Return the tensor of this name in the file of this name, if it has that many bytes."""
        found = self._tensors.get((file, tensor))
        return found if found is not None and found.size == size else None


def open_earlier(folder: Path, manifest: Manifest) -> Earlier:
    """Return the tensors of a resharded folder. Raises IntegrityError if its files are not what its manifest says."""
    tensors = {}
    for record in (*manifest.rank_files, *([manifest.unused_file] if manifest.unused_file else [])):
        path = written_file(folder, record)
        for info in read_rank_header(path, record).tensors:
            tensors[record.name, info.name] = Taken(path, info.start, info.nbytes, record.tensors[info.name])
    return Earlier(tensors)

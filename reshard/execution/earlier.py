"""An earlier folder of the same model: tensors whose bytes are the same share the blocks of its rank files.

Only some file systems can do that (XFS with reflink, btrfs). Elsewhere nothing is taken over: a copy would take longer
than to write what is in memory already.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

from ..resharded.layout import ALIGNMENT
from ..resharded.manifest import Manifest
from ..resharded.rank_file import read_rank_header, written_file
from ..storage.disk import pwrite

__all__ = ["Earlier", "Taken", "open_earlier"]

_FICLONERANGE = 0x4020940D  # ioctl_ficlonerange(2)
_CANNOT = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.EPERM, errno.ETXTBSY)


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

    def share(self, fd: int, offset: int) -> bool:
        """Let an offset of another file have its bytes: whole blocks are shared, what is around them is copied. Return
        False if the file system cannot. Who uses the bytes digests them there: they may have been altered.

        Raises OSError.
        """
        edge = min(self.size, -offset % ALIGNMENT)
        middle = (self.size - edge) // ALIGNMENT * ALIGNMENT
        with open(self.path, "rb", buffering=0) as source:
            if middle and not _shared(source.fileno(), self.start + edge, fd, offset + edge, middle):
                return False
            for at, size in ((0, edge), (edge + middle, self.size - edge - middle)):
                pwrite(fd, memoryview(os.pread(source.fileno(), size, self.start + at)), offset + at)
        return True


def _shared(source: int, start: int, target: int, offset: int, size: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONERANGE, struct.pack("qQQQ", source, start, size, offset))
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        return False
    return True


class Earlier:
    """The tensors of an earlier folder, by file and name. `shared` are the bytes that were taken over from it."""

    def __init__(self, tensors: dict[tuple[str, str], Taken]) -> None:
        self._tensors = tensors
        self._lock = threading.Lock()
        self._can = True
        self.shared = 0

    def find(self, file: str, tensor: str, size: int) -> Taken | None:
        """Return the tensor of this name in the file of this name, if it has that many bytes and can be shared."""
        found = self._tensors.get((file, tensor)) if self._can else None
        return found if found is not None and ALIGNMENT < found.size == size else None

    def take(self, there: Taken, fd: int, offset: int) -> bool:
        """Let an offset of another file have a tensor. From the first that cannot be shared on, none is found."""
        self._can = self._can and there.share(fd, offset)
        return self._can

    def count(self, size: int) -> None:
        """Count the bytes of a tensor that was taken over, from any thread."""
        with self._lock:
            self.shared += size


def open_earlier(folder: Path, manifest: Manifest) -> Earlier:
    """Return the tensors of a resharded folder. Raises IntegrityError if its files are not what its manifest says."""
    tensors = {}
    for record in (*manifest.rank_files, *([manifest.unused_file] if manifest.unused_file else [])):
        path = written_file(folder, record)
        for info in read_rank_header(path, record).tensors:
            tensors[record.name, info.name] = Taken(path, info.start, info.nbytes, record.tensors[info.name])
    return Earlier(tensors)

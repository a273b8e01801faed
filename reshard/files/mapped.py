"""Files mapped for reading. If somebody cuts one short meanwhile, that is an error and not the end of the process.

Touching a page that the mapped file no longer has raises SIGBUS, which kills the process. A handler here maps zeros
over the rest of that mapping and notes that the file shrank. The reading goes on until `check` says what happened. If
no file shrinks, the handler costs nothing.

A handler in Python is not sound in general. It is here, because:

- The signal is synchronous. It comes at the instruction that loads from a mapping: in a digest, a copy or a comparison.
  These are loops over plain bytes. They hold no lock that the handler could want, neither malloc's nor one of Python's.
- A reader that holds the GIL runs the handler as if it had called it. A reader without it (a digest, a copy of torch's,
  also in torch's own threads) waits for the GIL, and no holder of the GIL waits for a reader without releasing it.
- The kernel saves the registers, vector ones included, and makes the load again when the handler returns.
- Handlers in several threads at once do the same thing twice. A handler that is interrupted has done nothing: the load
  faults again.

A fault elsewhere, and a signal that somebody sent, end as they would without the handler. A system call that reads a
mapping of a shortened file gets EFAULT and no signal; `check` finds that too. Systems other than Linux have no guard.

Python's own mappings keep a descriptor open each, and a checkpoint can have more files than a process may open. The
mappings here are made by the system's mmap, and keep none.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import signal
import sys
import weakref
from pathlib import Path
from typing import Any

from ..errors import IntegrityError
from ..text import printable
from .system import by_errno

__all__ = ["MappedFile", "check_unchanged", "mapped"]


def check_unchanged(path: Path, *, size: int, mtime_ns: int) -> None:
    """Raise IntegrityError if a file has changed since it was opened, StorageError if the system does not say."""
    try:
        status = os.stat(path)
    except OSError as error:
        words = f"{printable(path)}: {error.strerror}, while it was being read"
        raise by_errno(error, words, IntegrityError) from None
    if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
        raise IntegrityError(f"{printable(path)}: changed while it was being read")


class _Mapping:
    """The addresses of a mapped file. `missing` is the first byte found that the file did not have any more."""

    __slots__ = ("missing", "size", "start")

    def __init__(self, start: int, size: int) -> None:
        self.start, self.size = start, size
        self.missing: int | None = None

    def put_zeros(self, address: int) -> bool:
        """If `address` is in this mapping, put zeros in place of its pages from there on. Returns whether it did."""
        end = self.start + self.size
        if not self.start <= address < end:
            return False
        self.missing = address - self.start
        page = address - address % mmap.PAGESIZE
        return bool(_libc.mmap(page, end - page, mmap.PROT_READ, _ZEROS, -1, 0) == page)


_guarded: set[_Mapping] = set()


def mapped(fd: int, size: int) -> tuple[memoryview, _Mapping]:
    """Map the first `size` bytes of an open file, which need not stay open. They stay mapped, and guarded, until the
    last view of them is gone. Raises OSError."""
    start = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if start in (None, _FAILED):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    mapping = _Mapping(start, size)
    _guarded.add(mapping)
    _install()
    data = (ctypes.c_char * size).from_address(start)
    weakref.finalize(data, _unmap, mapping).atexit = False  # mappings end with the process
    return memoryview(data).toreadonly().cast("B"), mapping


def _unmap(mapping: _Mapping) -> None:
    _guarded.discard(mapping)  # first: after munmap the addresses may belong to another mapping
    _libc.munmap(mapping.start, mapping.size)


class MappedFile:
    """A file of a known size, mapped for reading. Its bytes are `data`, also after the file was removed.

    If the file is cut short, the missing bytes read as zeros and `shrunk` is set. As a context it checks at the end,
    also after an error: nothing concluded from missing bytes holds.
    """

    def __init__(self, path: Path, *, size: int, mtime_ns: int | None = None) -> None:
        """Map the file. `check` compares the time of its last change with `mtime_ns`, by default its time now.

        Raises:
            IntegrityError: the file is shorter, empty or gone.
            StorageError: the system does not let it be read.
        """
        self._path, self._size = path, size
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # not a FIFO
            try:
                status = os.fstat(fd)
                if status.st_size < size or not size:
                    raise IntegrityError(f"{printable(path)}: changed while it was being read")
                self._mtime_ns = status.st_mtime_ns if mtime_ns is None else mtime_ns
                self.data, self._mapping = mapped(fd, size)
            finally:
                os.close(fd)
        except OSError as error:
            words = f"{printable(path)}: cannot be read: {error.strerror}"
            raise by_errno(error, words, IntegrityError) from None

    @property
    def shrunk(self) -> bool:
        """Whether bytes were missing when they were read."""
        return self._mapping.missing is not None

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception):
            self.check()

    def check(self) -> None:
        """Raise IntegrityError if the bytes are not, or may not have been, those of the file as it was opened;
        StorageError if its disk failed."""
        check_unchanged(self._path, size=self._size, mtime_ns=self._mtime_ns)
        if (missing := self._mapping.missing) is not None:
            self._read_at(missing)
            raise IntegrityError(f"{printable(self._path)}: was cut short while it was being read, and put right again")

    def _read_at(self, at: int) -> None:
        """Raise the disk's error if there is one. A failed disk and a shortened file send the same signal; a system
        call tells them apart."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.pread(fd, 1, at)
            finally:
                os.close(fd)
        except OSError as error:
            words = f"{printable(self._path)}: could not be read to its end: {error.strerror}"
            raise by_errno(error, words, IntegrityError) from None


class _Action(ctypes.Structure):
    """struct sigaction of 64-bit Linux, as glibc and musl have it."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_KNOWN = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") and sys.maxsize > 2**32
_SIGINFO = 4  # SA_SIGINFO
_CODE, _ADDRESS = 8, 16  # offsets of si_code and si_addr in siginfo_t
_ABSENT = 2  # BUS_ADRERR: the file has no such page
_ZEROS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED: in place of what is mapped there

_FAILED = ctypes.c_void_p(-1).value  # MAP_FAILED

_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def _on_bus_error(_number: int, info: int, _context: int) -> None:
    code = ctypes.c_int.from_address(info + _CODE).value
    try:
        address = ctypes.c_void_p.from_address(info + _ADDRESS).value or 0
        if code == _ABSENT and any(mapping.put_zeros(address) for mapping in list(_guarded)):
            return
    except Exception:  # out of memory: the signal ends the process, as below
        pass
    except BaseException:  # Ctrl-C is lost, but the run fails anyway: its file is lost
        return
    _libc.sigaction(signal.SIGBUS, ctypes.byref(_before), None)
    _before.handler = None  # the default, in case that handler comes back here
    if code <= 0:  # sent by somebody: it would not come again by itself
        signal.raise_signal(signal.SIGBUS)


_before = _Action()
_handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_on_bus_error)
_ours = _Action(handler=ctypes.cast(_handler, ctypes.c_void_p), flags=_SIGINFO)


def _install() -> None:
    """Install the handler. Called at every mapping: somebody may have replaced it since the last one."""
    now = _Action()
    if _KNOWN and _libc.sigaction(signal.SIGBUS, None, ctypes.byref(now)) == 0 and now.handler != _ours.handler:
        ctypes.memmove(ctypes.byref(_before), ctypes.byref(now), ctypes.sizeof(_Action))
        _libc.sigaction(signal.SIGBUS, ctypes.byref(_ours), None)

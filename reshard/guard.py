"""Files mapped for reading that somebody may cut short meanwhile: an error then, and not the end of the process.

To touch a page that the file of a mapping no longer has is a SIGBUS, which kills. Here it has a handler: it maps zeros
over the rest of that mapping, notes that the file shrank, and the reading goes on, until `check` says what happened.
Where no file shrinks nothing is paid for it.

Why a handler in Python is sound here, which it is not in general:

- The signal is synchronous. It comes at the instruction that loads from a mapping: in a digest, a copy or a comparison,
  loops over plain bytes that hold no lock which the handler could want, neither malloc's nor one of Python's.
- A reader that holds the GIL runs the handler as if it had called it. One without it (a digest, a copy of torch's, also
  in torch's own threads) waits for the GIL, and nobody who holds it waits for a reader without letting go of it.
- The kernel saves the registers, vector ones included, and the load is made again when the handler returns.
- Handlers in several threads at once do the same thing twice. One that is interrupted has done nothing: the load faults
  again.

A fault elsewhere, and a signal that somebody sent, end as they would have. A system call that reads such a mapping gets
no signal but EFAULT; `check` is the answer to that too. Systems other than Linux have no guard.
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

from .errors import IntegrityError, printable

__all__ = ["MappedFile", "check_unchanged"]


def check_unchanged(path: Path, *, size: int, mtime_ns: int) -> None:
    """Raises IntegrityError where a file is not what it was when it was opened."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise IntegrityError(f"{printable(path)}: {error.strerror}, while it was being read") from None
    if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
        raise IntegrityError(f"{printable(path)}: changed while it was being read")


class MappedFile:
    """A file of a known size, mapped for reading. Its bytes are `data`.

    From where the file is cut short they read as zeros, and `shrunk` is set. As a context it checks at the end, also
    after an error: nothing that was concluded from such bytes holds.
    """

    def __init__(self, path: Path, *, size: int, mtime_ns: int | None = None) -> None:
        """The file must be the one last changed at `mtime_ns`, or as it is now. Raises IntegrityError."""
        self._path, self._size, self.shrunk = path, size, False
        try:
            with open(
                path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
            ) as file:  # not a FIFO
                self._mtime_ns = os.fstat(file.fileno()).st_mtime_ns if mtime_ns is None else mtime_ns
                self.data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except ValueError:  # it is shorter
            raise IntegrityError(f"{printable(path)}: changed while it was being read") from None
        except OSError as error:
            raise IntegrityError(f"{printable(path)}: cannot be read: {error.strerror}") from None
        self._start = _address(self.data)
        _guarded.add(self)
        _install()

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception):
            self.check()

    def check(self) -> None:
        """Raises IntegrityError where the bytes are not, or may not have been, those of the file as it was opened."""
        check_unchanged(self._path, size=self._size, mtime_ns=self._mtime_ns)
        if self.shrunk:  # and is as it was again; or its disk failed, which is the same signal
            raise IntegrityError(f"{printable(self._path)}: could not be read to its end")

    def put_zeros(self, address: int) -> bool:
        """Where `address` is in this mapping, have zeros in place of its pages from there on."""
        end = self._start + self._size
        if not self._start <= address < end:
            return False
        self.shrunk = True
        page = address - address % mmap.PAGESIZE
        return bool(_libc.mmap(page, end - page, mmap.PROT_READ, _ZEROS, -1, 0) == page)


_guarded: weakref.WeakSet[MappedFile] = weakref.WeakSet()


def _address(data: mmap.mmap) -> int:
    view = (ctypes.c_void_p * 16)()  # a Py_buffer: its first member is the address
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(data), view, 0)
    ctypes.pythonapi.PyBuffer_Release(view)
    return view[0] or 0


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
_CODE, _ADDRESS = 8, 16  # of si_code and si_addr in siginfo_t
_ABSENT = 2  # BUS_ADRERR: the file has no such page
_ZEROS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED: in place of what is mapped there

_libc: Any = ctypes.CDLL(None)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)


def _on_bus_error(_number: int, info: int, _context: int) -> None:
    code = ctypes.c_int.from_address(info + _CODE).value
    try:
        address = ctypes.c_void_p.from_address(info + _ADDRESS).value or 0
        if code == _ABSENT and any(file.put_zeros(address) for file in list(_guarded)):
            return
    except Exception:  # out of memory: then it ends here
        pass
    except BaseException:  # Ctrl-C is lost, but so is the file, and with it the run
        return
    _libc.sigaction(signal.SIGBUS, ctypes.byref(_before), None)
    _before.handler = None  # the default, in case that comes back here
    if code <= 0:  # sent by somebody: it would not come again by itself
        signal.raise_signal(signal.SIGBUS)


_before = _Action()
_handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_on_bus_error)
_ours = _Action(handler=ctypes.cast(_handler, ctypes.c_void_p), flags=_SIGINFO)


def _install() -> None:
    """At every mapping: somebody may have put a handler in its place since the last one."""
    now = _Action()
    if _KNOWN and _libc.sigaction(signal.SIGBUS, None, ctypes.byref(now)) == 0 and now.handler != _ours.handler:
        ctypes.memmove(ctypes.byref(_before), ctypes.byref(now), ctypes.sizeof(_Action))
        _libc.sigaction(signal.SIGBUS, ctypes.byref(_ours), None)

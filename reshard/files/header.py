"""Headers of safetensors files, read strictly: nothing that the safetensors library refuses is accepted here.

The rules come from the format's specification (https://github.com/huggingface/safetensors#format) and from the
library's own validation. Nobody vouches for these bytes, so they stay in a mapping of the file, and the JSON object is
walked one member at a time. The first bad member ends the reading, before a crafted header can take time or memory (a
second and 64 MB at most, whatever its 100 MB are).
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadInputError
from ..text import printable
from .mapped import MappedFile
from .mistaken import FIRST_BYTES, mistaken
from .system import by_errno

__all__ = [
    "DTYPE_BITS",
    "ENTRY_LIMIT",
    "HEADER_LIMIT",
    "TEXT_LIMIT",
    "Header",
    "TensorInfo",
    "header_length",
    "parse_header",
    "read_header",
]

HEADER_LIMIT = 100_000_000  # bytes of JSON, as in the safetensors library
ENTRY_LIMIT = 100_000  # tensors, or metadata keys: 2 million tiny ones fit in 100 MB, and would take a gigabyte
TEXT_LIMIT = 16 << 20  # bytes of all names together, and of one value in the metadata
RANK_LIMIT = 64  # dims: torch's operators take no more

_CODES = {4: "F4", 6: "F6_E2M3 F6_E3M2", 16: "I16 U16 F16 BF16", 32: "I32 U32 F32", 64: "I64 U64 F64 C64"}
_CODES[8] = "BOOL U8 I8 F8_E4M3 F8_E4M3FNUZ F8_E5M2 F8_E5M2FNUZ F8_E8M0"  # all that safetensors 0.8 accepts
DTYPE_BITS: dict[str, int] = {code: bits for bits, codes in _CODES.items() for code in codes.split()}

_SPACE = rb"(?=([ \t\n\r]*))\1"  # all the space there is: a second try with less would take a second for 99 MB
_OPEN, _COLON = re.compile(rb"\{[ \t\n\r]*\}?"), re.compile(_SPACE + rb":[ \t\n\r]*")
_NEXT, _PADDING = re.compile(_SPACE + rb"(?:,[ \t\n\r]*|\})"), re.compile(rb" *")
_ENTRY = re.compile(rb"\{[^{}]{0,4096}\}")  # a legal entry nests nothing, and is short even with 64 indented dims
_CLOSE = ord("}")
_PLAIN = re.compile(rb'"[^"\\\x00-\x1f]*"')  # a string without escapes


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor in `file`: its safetensors dtype code, and its bytes `start` to `end` from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A whole header: `raw` is its JSON as it stands in the file, padding included; `tensors` are in offset order.

    The metadata are checked and not kept: nothing here needs them.
    """

    raw: bytes
    tensors: tuple[TensorInfo, ...]

    @property
    def head(self) -> bytes:
        """The bytes of the file before the data: the length of the JSON, and the JSON."""
        return len(self.raw).to_bytes(8, "little") + self.raw

    @property
    def data_start(self) -> int:
        """Byte offset in the file of the first byte of data."""
        return 8 + len(self.raw)


_STRING = json.JSONDecoder()
# Numbers that no header may hold (1.0, NaN) stay text: a text is neither an integer nor a known dtype.
_FLAT = json.JSONDecoder(object_pairs_hook=list, parse_float=str, parse_constant=str)


def _show(value: object) -> str:
    """Return `value` for a message. It is cut first: printable() walks all of it, and a name can have megabytes."""
    return printable(value[:200] if isinstance(value, str) else value)


def _here(text: memoryview, pos: int) -> str:
    return f"at byte {pos}, got '{_show(str(text[pos : pos + 40], 'utf-8', 'replace'))}'"


def _step(pattern: re.Pattern[bytes], text: memoryview, pos: int, what: str) -> int:
    match = pattern.match(text, pos)
    if match is None:
        raise ValueError(f"expected {what} {_here(text, pos)}")
    return match.end()


def _string(text: memoryview, pos: int) -> tuple[str, int]:
    """Return the JSON string that starts at text[pos], and the position of its end."""
    match = _PLAIN.match(text, pos)
    if match is not None:
        if match.end() - pos > TEXT_LIMIT:
            raise ValueError(f"a string of more than {TEXT_LIMIT} bytes {_here(text, pos)}")
        return str(text[pos + 1 : match.end() - 1], "utf-8"), match.end()
    if text[pos : pos + 1] != b'"':
        raise ValueError(f"expected a string {_here(text, pos)}")
    for size in (1 << 10, 1 << 16, TEXT_LIMIT):  # most strings are short: do not copy the rest of the header for each
        window, _ = codecs.utf_8_decode(text[pos : pos + size], "strict", False)  # it may end within a character
        try:
            value, length = _STRING.raw_decode(window)
        except ValueError as error:
            failure = error
            continue
        value.encode()  # raises for a lone surrogate (\ud800), which is no text
        return value, pos + len(window[:length].encode())
    raise ValueError(f"a string that has no end within {TEXT_LIMIT} bytes, or no meaning ({failure}), at byte {pos}")


def _object(text: memoryview, pos: int, read: Callable[[str, int], int]) -> int:
    """Return the end of the JSON object that starts at text[pos]. `read(key, pos)` takes one value, returns its end."""
    seen: set[str] = set()
    room = TEXT_LIMIT
    pos = _step(_OPEN, text, pos, "an object")
    while text[pos - 1] != _CLOSE:
        key, end = _string(text, pos)
        if key in seen:
            raise ValueError(f"duplicate key '{_show(key)}'")
        seen.add(key)
        room -= end - pos
        if len(seen) > ENTRY_LIMIT or room < 0:
            raise ValueError(f"more than {ENTRY_LIMIT} entries, or {TEXT_LIMIT} bytes of names")
        pos = read(key, _step(_COLON, text, end, "':'"))
        pos = _step(_NEXT, text, pos, "',' or '}'")
    return pos


def _integers(value: object, what: str, most: int) -> list[int]:
    if type(value) is not list or len(value) > most or not {*map(type, value)} <= {int}:  # True is no integer here
        raise ValueError(f"expected {what} of at most {most} integers, got {_show(value)}")
    return value


def _tensor(name: str, pairs: list[tuple[str, object]], file: str, data_start: int) -> TensorInfo:
    fields = dict(pairs)
    if len(pairs) != 3 or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"expected dtype, shape and data_offsets once each, got {_show([key for key, _ in pairs])}")
    dtype, shape = str(fields["dtype"]), _integers(fields["shape"], "a shape", RANK_LIMIT)
    if dtype not in DTYPE_BITS:
        raise ValueError(f"expected a dtype known to safetensors, got {_show(dtype)}")
    offsets = _integers(fields["data_offsets"], "data_offsets", 2)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"expected data_offsets [begin, end], got {_show(offsets)}")
    size, bits = offsets[1] - offsets[0], math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * size or max(bits, math.prod(filter(None, shape))) >= 2**63:  # a 0 does not excuse the other dims
        raise ValueError(f"{dtype} of shape {_show(shape)} takes {bits} bits (limit 2**63), expected 8 * {size}")
    return TensorInfo(name, dtype, tuple(shape), file, data_start + offsets[0], data_start + offsets[1])


def _members(text: memoryview, file: str, data_start: int) -> list[TensorInfo]:
    tensors: list[TensorInfo] = []

    def member(name: str, pos: int) -> int:
        try:
            if name == "__metadata__":
                return _object(text, pos, lambda _, value: _string(text, value)[1])
            end = _step(_ENTRY, text, pos, "a flat object of up to 4096 characters")
            entry = str(text[pos:end], "utf-8")
            if "-" in entry:  # -0 too: serde_json, and so safetensors, takes it for a float
                raise ValueError(f"expected no minus sign, got {_show(entry)}")
            tensors.append(_tensor(name, _FLAT.raw_decode(entry)[0], file, data_start))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{_show(name)}: {error}") from None
        return end

    end = _step(_PADDING, text, _object(text, 0, member), "spaces")
    if end != len(text):
        raise ValueError(f"expected only spaces after the JSON {_here(text, end)}")
    return tensors


def _check_layout(tensors: list[TensorInfo], end: int, file_size: int) -> None:
    for info in tensors:
        if info.start != end:
            raise ValueError(f"{_show(info.name)}: expected data from byte {end}, got {info.start} (hole or overlap)")
        end = info.end
    if end != file_size:
        raise ValueError(f"expected a file of {end} bytes by its header, got {file_size}")


def header_length(first: bytes, *, file: str, file_size: int) -> int:
    """Return the bytes of the header's JSON of a file of `file_size` bytes that begins with `first`. Raises
    BadInputError, which says what the file is instead if its first bytes tell."""
    length = int.from_bytes(first[:8], "little")
    try:
        _check_length(length, file, file_size)
    except BadInputError:
        found = mistaken(first[:FIRST_BYTES])
        if found is None:
            raise
        raise BadInputError(f"{printable(file)}: is {found[0]}", hint=found[1]) from None
    return length


def _check_length(length: int, file: str, file_size: int) -> None:
    if not 0 < length <= min(HEADER_LIMIT, file_size - 8):
        what = f"expected 1 to {HEADER_LIMIT}, within a file of {file_size} bytes"
        raise BadInputError(f"{printable(file)}: header length {length}, {what}")


def parse_header(raw: bytes | memoryview, *, file: str, file_size: int) -> Header:
    """Parse `raw`, the JSON of the header of a file of `file_size` bytes. `file` names it in messages and in tensors.

    Raises:
        BadInputError: `raw` breaks a rule of the format, or does not describe a file of that size.
    """
    _check_length(len(raw), file, file_size)
    try:
        tensors = _members(memoryview(raw), file, 8 + len(raw))
        tensors.sort(key=lambda info: (info.start, info.end))
        _check_layout(tensors, 8 + len(raw), file_size)
    except ValueError as error:
        raise BadInputError(f"{printable(file)}: {printable(error, 600)}") from None
    return Header(bytes(raw), tuple(tensors))


def read_header(path: str | os.PathLike[str], *, file: str) -> Header:
    """Read the header of the safetensors file at `path`, without its data; `file` is its name inside the source folder.

    Raises:
        BadInputError: not a regular file (a FIFO does not block), or the header breaks a rule of the format.
        IntegrityError: it changed meanwhile.
        StorageError: the system does not let it be read.
    """
    try:
        with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as source:
            if not os.path.isfile(source.fileno()):
                raise BadInputError(f"{printable(file)}: expected a regular file")
            size = os.fstat(source.fileno()).st_size
            length = header_length(source.read(FIRST_BYTES), file=file, file_size=size)
    except OSError as error:
        raise by_errno(error, f"{printable(file)}: cannot be read: {error.strerror}", BadInputError) from None
    with MappedFile(Path(path), size=size) as mapped:
        return parse_header(mapped.data[8 : 8 + length], file=file, file_size=size)

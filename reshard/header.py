"""Headers of safetensors files, read strictly: nothing that the safetensors library refuses is accepted here.

The rules are those of the format's specification (https://github.com/huggingface/safetensors#format) and of the
library's own validation. Nobody vouches for these bytes, so the JSON object is walked one member at a time: the first
bad tensor ends the reading, before a crafted header can take time or memory.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from .errors import BadInputError, printable

__all__ = ["DTYPE_BITS", "ENTRY_LIMIT", "HEADER_LIMIT", "Header", "TensorInfo", "parse_header", "read_header"]

HEADER_LIMIT = 100_000_000  # bytes of JSON, as in the safetensors library
ENTRY_LIMIT = 500_000  # tensors, or metadata keys: 2 million tiny ones fit in 100 MB, and would take a gigabyte
RANK_LIMIT = 64  # dims: torch's operators take no more

_CODES = {4: "F4", 6: "F6_E2M3 F6_E3M2", 16: "I16 U16 F16 BF16", 32: "I32 U32 F32", 64: "I64 U64 F64 C64"}
_CODES[8] = "BOOL U8 I8 F8_E4M3 F8_E4M3FNUZ F8_E5M2 F8_E5M2FNUZ F8_E8M0"  # all that safetensors 0.8 accepts
DTYPE_BITS: dict[str, int] = {code: bits for bits, codes in _CODES.items() for code in codes.split()}

_OPEN, _COLON = re.compile(r"\{[ \t\n\r]*\}?"), re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_NEXT, _END = re.compile(r"[ \t\n\r]*(?:,[ \t\n\r]*|\})"), re.compile(r" *\Z")
_ENTRY = re.compile(r"\{[^{}]{0,4096}\}")  # a legal one nests nothing, and is short even with 64 indented dims


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
    """A whole header: `raw` is its JSON as it stands in the file, padding included; `tensors` are in offset order."""

    raw: bytes
    metadata: dict[str, str]
    tensors: tuple[TensorInfo, ...]

    @property
    def head(self) -> bytes:
        """Everything in the file before the data: the length of the JSON, and the JSON."""
        return len(self.raw).to_bytes(8, "little") + self.raw

    @property
    def data_start(self) -> int:
        """Byte offset in the file of the first byte of data."""
        return 8 + len(self.raw)


_STRING = json.JSONDecoder()
# Numbers that no header may hold (1.0, NaN) stay text: as such they are neither an integer nor a known dtype.
_FLAT = json.JSONDecoder(object_pairs_hook=list, parse_float=str, parse_constant=str)


def _show(value: object) -> str:
    """`value` for a message; cut first, since printable() walks all of it and a name can have 99 MB."""
    return printable(value[:200] if isinstance(value, str) else value)


def _step(pattern: re.Pattern[str], text: str, pos: int, what: str) -> int:
    match = pattern.match(text, pos)
    if match is None:
        raise ValueError(f"expected {what} at character {pos}, got '{_show(text[pos : pos + 40])}'")
    return match.end()


def _string(text: str, pos: int) -> tuple[str, int]:
    """The JSON string that starts at text[pos], and where it ends."""
    if not text.startswith('"', pos):
        raise ValueError(f"expected a string at character {pos}, got '{_show(text[pos : pos + 40])}'")
    value, pos = _STRING.raw_decode(text, pos)
    if not value.isascii():
        value.encode()  # raises for a lone surrogate (\ud800), which is no text
    return value, pos


def _object(text: str, pos: int, read: Callable[[str, int], int]) -> int:
    """Where the JSON object that starts at text[pos] ends; `read(key, pos)` takes one value, and tells its end."""
    seen: set[str] = set()
    pos = _step(_OPEN, text, pos, "an object")
    while text[pos - 1] != "}":
        key, pos = _string(text, pos)
        if key in seen or len(seen) == ENTRY_LIMIT:
            raise ValueError(f"duplicate key '{_show(key)}'" if key in seen else f"more than {ENTRY_LIMIT} entries")
        seen.add(key)
        pos = read(key, _step(_COLON, text, pos, "':'"))
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


def _members(text: str, file: str, data_start: int) -> tuple[dict[str, str], list[TensorInfo]]:
    metadata: dict[str, str] = {}
    tensors: list[TensorInfo] = []

    def metadatum(key: str, pos: int) -> int:
        metadata[key], end = _string(text, pos)
        return end

    def member(name: str, pos: int) -> int:
        try:
            if name == "__metadata__":
                return _object(text, pos, metadatum)
            end = _step(_ENTRY, text, pos, "a flat object of up to 4096 characters")
            if "-" in (entry := text[pos:end]):  # -0 too: it is a float to serde_json, hence to safetensors
                raise ValueError(f"expected no minus sign, got {_show(entry)}")
            tensors.append(_tensor(name, _FLAT.raw_decode(entry)[0], file, data_start))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{_show(name)}: {error}") from None
        return end

    _step(_END, text, _object(text, 0, member), "only spaces after the JSON")
    return metadata, tensors


def _check_layout(tensors: list[TensorInfo], end: int, file_size: int) -> None:
    for info in tensors:
        if info.start != end:
            raise ValueError(f"{_show(info.name)}: expected data from byte {end}, got {info.start} (hole or overlap)")
        end = info.end
    if end != file_size:
        raise ValueError(f"expected a file of {end} bytes by its header, got {file_size}")


def _check_length(length: int, file: str, file_size: int) -> None:
    if not 0 < length <= min(HEADER_LIMIT, file_size - 8):
        what = f"expected 1 to {HEADER_LIMIT}, within a file of {file_size} bytes"
        raise BadInputError(f"{printable(file)}: header length {length}, {what}")


def parse_header(raw: bytes, *, file: str, file_size: int) -> Header:
    """The header whose JSON is `raw`, of a file of `file_size` bytes; `file` names it in messages and in the tensors.

    Raises:
        BadInputError: `raw` breaks a rule of the format, or does not describe a file of that size.
    """
    _check_length(len(raw), file, file_size)
    try:
        if raw.count(b'"data_offsets"') > ENTRY_LIMIT:  # soon told; the walk would take seconds to find out
            raise ValueError(f"more than {ENTRY_LIMIT} tensors")
        metadata, tensors = _members(raw.decode(), file, 8 + len(raw))
        tensors.sort(key=lambda info: (info.start, info.end))
        _check_layout(tensors, 8 + len(raw), file_size)
    except ValueError as error:
        raise BadInputError(f"{printable(file)}: {printable(error, 600)}") from None
    return Header(raw, metadata, tuple(tensors))


def read_header(path: str | os.PathLike[str], *, file: str) -> Header:
    """The header of the safetensors file at `path`, without its data; `file` is its name inside the source folder.

    Raises:
        BadInputError: not a regular file (and a FIFO does not block), not readable, or not as the format has it.
    """
    try:
        with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as source:
            if not os.path.isfile(source.fileno()):
                raise BadInputError(f"{printable(file)}: expected a regular file")
            length = int.from_bytes(source.read(8), "little")
            _check_length(length, file, size := os.fstat(source.fileno()).st_size)
            raw = source.read(length)
    except OSError as error:
        raise BadInputError(f"{printable(file)}: cannot be read: {error.strerror}") from None
    return parse_header(raw, file=file, file_size=size)

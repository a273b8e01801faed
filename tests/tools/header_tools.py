"""Headers made by hand, and their contents as safetensors and reshard read them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError, deserialize

from reshard.errors import BadInputError
from reshard.files.header import Header, parse_header, read_header

FILE = "model-00001-of-00002.safetensors"


def join(raw: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(raw)) + raw + data


def entry(name: str, begin: int, end: int, *, dtype: str = "U8", shape: str | None = None) -> bytes:
    dims = f"[{end - begin}]" if shape is None else shape
    return f'"{name}":{{"dtype":"{dtype}","shape":{dims},"data_offsets":[{begin},{end}]}}'.encode()


def members(*parts: bytes) -> bytes:
    return b"{" + b",".join(parts) + b"}"


def fields(text: str) -> bytes:
    return f'{{"w":{{{text}}}}}'.encode()


def parse(blob: bytes) -> Header:
    """Parse as read_header does, without a file."""
    raw = blob[8 : 8 + int.from_bytes(blob[:8], "little")]
    return parse_header(raw, file=FILE, file_size=len(blob))


def read(folder: Path, blob: bytes) -> Header:
    path = folder / FILE
    path.write_bytes(blob)
    return read_header(path, file=FILE)


def theirs(blob: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Read with safetensors; None if it refuses."""
    try:
        found = deserialize(blob)
    except SafetensorError:
        return None
    return {name: (item["dtype"], tuple(item["shape"]), bytes(item["data"])) for name, item in found}


def ours(blob: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        parsed = parse(blob)
    except BadInputError:
        return None
    return {info.name: (info.dtype, info.shape, blob[info.start : info.end]) for info in parsed.tensors}


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(BadInputError) as caught:
        call()
    message = caught.value.message
    assert FILE in message
    assert message.isprintable()
    assert len(message) < 1000
    return message

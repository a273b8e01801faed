"""The header parser is never looser than safetensors, and hostile files cost it little."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from header_tools import FILE, entry, join, members, ours, read, refused, theirs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from reshard.header import HEADER_LIMIT, parse_header

BASES = [
    save({"a": torch.zeros(2, 3), "b": torch.ones(3, dtype=torch.int8), "e": torch.zeros(0, 4)}, {"format": "pt"}),
    save({"w": torch.zeros(2), "é\n": torch.zeros((), dtype=torch.bfloat16)}),
    join(members(entry("b", 1, 2), entry("a", 0, 1), entry("c", 2, 3, dtype="F4", shape="[2]")), bytes(3)),
]
SNIPPETS = [
    *(bytes([byte]) for byte in b'{}[]:," \n\t\r\\/-+.eE012389\0\x0c\x7f\xff'),
    *(b"-0", b"1.0", b"1e0", b"NaN", b"Infinity", b"true", b"null", b'"a"', b'"U8"', b'"F4"', b'"BOOL"', b"[]", b"{}"),
    *(str(2**power + more).encode() for power in (31, 32, 62, 63, 64) for more in (-1, 0, 1)),
    *(rb"\ud800", rb"\ude00", rb"\u0061", rb"\u 1", rb"\x41", b"\xef\xbb\xbf", b"\xc2\xa0", b"\xed\xa0\x80"),
    *(b'"dtype":"U8",', b'"shape":[0],', b'"data_offsets":[0,0],', b'"__metadata__":{},', b'"__metadata__":{"a":"b"},'),
    *(entry("z", 0, 0) + b",", entry("a", 0, 0) + b",", entry("a", 24, 24) + b","),
]  # fmt: skip
EDITS = st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 6), st.sampled_from([b"", *SNIPPETS]) | st.binary(max_size=3)),
    min_size=0,
    max_size=4,
)


def edited(base: bytes, edits: list[tuple[int, int, bytes]], length_by: int | None, tail: int) -> bytes:
    """`base` with parts of its header replaced; its length moved by `length_by` or right; its data cut or grown."""
    size = int.from_bytes(base[:8], "little")
    raw, data = base[8 : 8 + size], base[8 + size :]
    for at, count, new in edits:
        at %= len(raw) + 1
        raw = raw[:at] + new + raw[at + count :]
    data = data[: len(data) + tail] if tail < 0 else data + bytes(tail)
    stated = len(raw) if length_by is None else max(0, size + length_by)
    return struct.pack("<Q", stated) + raw + data


@pytest.mark.fault(11)
@settings(max_examples=1500, deadline=None)
@given(
    base=st.sampled_from(BASES),
    edits=EDITS,
    length_by=st.none() | st.none() | st.integers(-16, 16) | st.integers(0, 2**63),
    tail=st.just(0) | st.integers(-8, 8),
)
@example(base=BASES[0], edits=[], length_by=None, tail=0)
def test_never_looser_than_safetensors(
    base: bytes, edits: list[tuple[int, int, bytes]], length_by: int | None, tail: int
) -> None:
    blob = edited(base, edits, length_by, tail)
    found = ours(blob)
    assert found is None or found == theirs(blob)


NUMBERS = st.sampled_from(["0", "1", "2", "3", "-0", "-1", "1.0", "1e1", str(2**63), str(2**64), "true", "null", '"1"'])


@pytest.mark.fault(11)
@settings(max_examples=500, deadline=None)
@given(
    specs=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["U8", "F4", "F16", "X"]), st.lists(NUMBERS, max_size=3))
        .flatmap(lambda head: st.tuples(st.just(head), st.lists(NUMBERS, min_size=1, max_size=3))),
        max_size=3,
    ),
    size=st.integers(0, 6),
)  # fmt: skip
def test_never_looser_on_made_up_entries(specs: list[tuple[tuple[str, str, list[str]], list[str]]], size: int) -> None:
    parts = [
        f'"{name}":{{"dtype":"{dtype}","shape":[{",".join(dims)}],"data_offsets":[{",".join(offsets)}]}}'.encode()
        for (name, dtype, dims), offsets in specs
    ]
    blob = join(members(*parts), bytes(size))
    found = ours(blob)
    assert found is None or found == theirs(blob)


# --- truncation ---


@pytest.mark.fault(8)
def test_truncation_at_every_length(tmp_path: Path) -> None:
    blob = BASES[0]
    for size in range(len(blob)):
        refused(lambda size=size: read(tmp_path, blob[:size]))
    assert len(read(tmp_path, blob).tensors) == 3
    refused(lambda: read(tmp_path, blob + b"\0"))


# --- bombs ---


SIZE = HEADER_LIMIT - 1000
HALF = HEADER_LIMIT // 2
SHAPE = b'{"w":{"dtype":"U8","shape":'
BOMBS: dict[str, Callable[[], bytes]] = {
    "40M dims": lambda: SHAPE + b"[" + b"1," * (SIZE // 2) + b'1],"data_offsets":[0,1]}}',
    "one long dim": lambda: SHAPE + b"[" + b"1" * HALF + b'],"data_offsets":[0,1]}}',
    "one long float": lambda: SHAPE + b"[0." + b"1" * HALF + b'],"data_offsets":[0,1]}}',
    "nested lists": lambda: b'{"w":' + b"[" * HALF,
    "nested objects": lambda: b'{"w":' * (HALF // 5),
    "spaces in front": lambda: b"{" + b" " * SIZE + b"1}",
    "spaces in an entry": lambda: SHAPE + b" " * HALF + b"}}",
    "newlines after": lambda: b"{}" + b"\n" * HALF,
    "spaces, then a letter": lambda: b"{}" + b" " * SIZE + b"x",
    "one long name": lambda: b'{"' + b"a" * SIZE + b'":0}',
    "one long escaped name": lambda: b'{"' + b"\\n" * (HALF // 2) + b'":0}',
    "no end of string": lambda: b'{"' + b"a" * HALF,
    "backslashes": lambda: b'{"' + b"\\" * HALF,
    "quotes": lambda: b"{" + b'"' * HALF,
    "commas": lambda: b'{"w":{}' + b"," * HALF + b"}",
    "small members": lambda: b"{" + b'"":0,' * (HALF // 5) + b"}",
    "equal keys of metadata": lambda: b'{"__metadata__":{' + b'"":"",' * (HALF // 6) + b"}}",
    "empty tensors": lambda: b"{" + (entry("w", 0, 0) + b",") * (SIZE // 60) + b"}",
}  # fmt: skip


@pytest.mark.fault(10)
@pytest.mark.parametrize("name", BOMBS)
def test_bomb(name: str) -> None:
    raw = BOMBS[name]()
    assert HALF <= len(raw) + 100 <= HEADER_LIMIT
    tracemalloc.start()
    try:
        start = time.process_time()
        refused(lambda: parse_header(raw, file=FILE, file_size=8 + len(raw)))
        assert time.process_time() - start < 3
        assert tracemalloc.get_traced_memory()[1] < 400e6
    finally:
        tracemalloc.stop()


@pytest.mark.fault(10)
def test_metadata_of_many_keys() -> None:
    raw = b'{"__metadata__":{' + b",".join(b'"%x":""' % key for key in range(700_000)) + b"}}"
    start = time.process_time()
    assert "more than" in refused(lambda: parse_header(raw, file=FILE, file_size=8 + len(raw)))
    assert time.process_time() - start < 4


def test_a_hundred_thousand_tensors_take_about_a_second() -> None:
    name = "model.layers.{}.mlp.experts.{}.down_proj.weight"
    size = 4096 * 1536 * 2
    found = {
        name.format(i // 100, i % 100): {
            "dtype": "BF16",
            "shape": [4096, 1536],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(100_000)
    }
    raw = json.dumps({"__metadata__": {"format": "pt"}, **found}, separators=(",", ":")).encode()
    start = time.process_time()
    parsed = parse_header(raw, file=FILE, file_size=8 + len(raw) + 100_000 * size)
    assert time.process_time() - start < 3
    assert len(parsed.tensors) == 100_000

"""The header parser is never looser than safetensors, and hostile files cost it little."""

from __future__ import annotations

import gc
import json
import math
import os
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from header_tools import FILE, entry, join, members, ours, read, refused, theirs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import reshard
from reshard.files.header import DTYPE_BITS, ENTRY_LIMIT, HEADER_LIMIT, TEXT_LIMIT, parse_header

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
    """Return `base` with parts of its header replaced, the length right or off by `length_by`, data cut or longer."""
    size = int.from_bytes(base[:8], "little")
    raw, data = base[8 : 8 + size], base[8 + size :]
    for at, count, new in edits:
        at %= len(raw) + 1
        raw = raw[:at] + new + raw[at + count :]
    data = data[: len(data) + tail] if tail < 0 else data + bytes(tail)
    stated = len(raw) if length_by is None else max(0, size + length_by)
    return struct.pack("<Q", stated) + raw + data


CHANGED = st.builds(
    edited,
    st.sampled_from(BASES),
    EDITS,
    st.none() | st.none() | st.integers(-16, 16) | st.integers(0, 2**63),
    st.just(0) | st.integers(-8, 8),
)
NUMBERS = st.sampled_from(["0", "1", "2", "3", "-0", "-1", "1.0", "1e1", str(2**63), str(2**64), "true", "null", '"1"'])


@st.composite
def made_up(draw: st.DrawFn) -> bytes:
    """Draw a file whose numbers need not fit together."""
    parts = []
    for _ in range(draw(st.integers(0, 3))):
        name, dtype = draw(st.sampled_from("abc")), draw(st.sampled_from(["U8", "F4", "F16", "X"]))
        dims, offsets = (",".join(draw(st.lists(NUMBERS, min_size=least, max_size=3))) for least in (0, 1))
        parts.append(f'"{name}":{{"dtype":"{dtype}","shape":[{dims}],"data_offsets":[{offsets}]}}'.encode())
    return join(members(*parts), bytes(draw(st.integers(0, 6))))


@st.composite
def legal(draw: st.DrawFn) -> bytes:
    """Draw a legal file in an unusual form: any order, white space, escapes and padding."""

    def space() -> str:
        return draw(st.text(" \t\n\r", max_size=2))

    def string(text: str) -> str:
        escaped = draw(st.sampled_from(["never", "where needed", "always"]))
        return json.dumps(text, ensure_ascii=escaped != "never") if escaped != "always" else f'"{units(text)}"'

    def units(text: str) -> str:
        found = text.encode("utf-16-be")
        return "".join(f"\\u{found[i : i + 2].hex()}" for i in range(0, len(found), 2))

    def collection(brackets: str, parts: Iterable[str]) -> str:
        return brackets[0] + space() + ",".join(f"{part}{space()}" for part in parts) + brackets[1]

    def fields(pairs: dict[str, str]) -> str:
        pairs = dict(draw(st.permutations(sorted(pairs.items()))))
        return collection("{}", (f"{space()}{string(key)}{space()}:{space()}{value}" for key, value in pairs.items()))

    texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    names = texts.filter(lambda name: name != "__metadata__")
    specs = draw(
        st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 5), max_size=4)))
    )
    entries, at = {}, 0
    for name in draw(st.permutations(sorted(specs))):
        dtype, shape = specs[name]
        shape = [*shape, 8] if math.prod(shape) * DTYPE_BITS[dtype] % 8 else shape
        end = at + math.prod(shape) * DTYPE_BITS[dtype] // 8
        pair = {"dtype": f'"{dtype}"', "shape": shape, "data_offsets": [at, end]}
        entries[name] = fields({k: v if isinstance(v, str) else collection("[]", map(str, v)) for k, v in pair.items()})
        at = end
    if draw(st.booleans()):
        metadata = draw(st.dictionaries(texts, texts, max_size=3))
        entries["__metadata__"] = fields({key: string(value) for key, value in metadata.items()})
    return join(fields(entries).encode() + b" " * draw(st.integers(0, 9)), bytes(at))


def verdict(blob: bytes) -> str:
    """Return who accepts it. Our parser may accept nothing that safetensors refuses, nor read it differently."""
    found, reference = ours(blob), theirs(blob)
    assert found is None or found == reference
    return "accepted" if found is not None else "refused" if reference is None else "refused by us alone"


@pytest.mark.fault(11)
@settings(max_examples=1500, deadline=None)
@given(CHANGED)
@example(BASES[0])
def test_never_looser_than_safetensors(blob: bytes) -> None:
    verdict(blob)


@pytest.mark.fault(11)
@settings(max_examples=500, deadline=None)
@given(made_up())
def test_never_looser_on_made_up_entries(blob: bytes) -> None:
    verdict(blob)


@pytest.mark.fault(9)
@settings(max_examples=300, deadline=None)
@given(legal())
def test_every_legal_file_is_read(blob: bytes) -> None:
    assert verdict(blob) == "accepted"


MORE = {"changed": (CHANGED, 60_000), "made up": (made_up(), 30_000), "legal": (legal(), 10_000)}


@pytest.mark.fault(9, 11)
@pytest.mark.slow
@pytest.mark.parametrize("kind", MORE)
def test_many_more(kind: str) -> None:
    files, count = MORE[kind]
    counts = Counter[str]()
    stricter: list[bytes] = []

    @settings(max_examples=count, deadline=None, database=None)
    @given(files)
    def run(blob: bytes) -> None:
        found = verdict(blob)
        counts[found] += 1
        if found == "refused by us alone":
            stricter.append(blob)

    run()
    print(f"{counts.total()} files: {dict(counts)}")
    for blob in sorted(stricter, key=len)[:20]:
        print(blob)


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
LONG = b"a" * (TEXT_LIMIT - 9)
FILLED = HEADER_LIMIT // TEXT_LIMIT
MEMORY = 64 << 20
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
    "equal tensors": lambda: b"{" + (entry("w", 0, 0) + b",") * (SIZE // 60) + b"}",
    "a million tensors": lambda: members(*(entry(f"{i:x}", 0, 0) for i in range(10**6))),
    "a hundred thousand, and a letter": lambda: members(*(entry(f"{i:x}", 0, 0) for i in range(ENTRY_LIMIT))) + b"x",
    "a million keys": lambda: b'{"__metadata__":{' + b",".join(b'"%x":""' % i for i in range(10**6)) + b"}}",
    "long names": lambda: b"{" + b",".join(entry(f"{i:04000}", 0, 0) for i in range(20_000)) + b"}",
    "long values": lambda: b'{"__metadata__":{' + b",".join(b'"%d":"%s"' % (i, LONG) for i in range(FILLED)) + b"}}x",
    "long escaped values": lambda: b'{"__metadata__":{' + b'"1":"' + rb"\"" * (TEXT_LIMIT // 2 - 1) + b'"}}x',
    "spaces before a colon": lambda: b'{"w"' + b" " * SIZE + b"}",
    "spaces before a comma": lambda: members(entry("w", 0, 0))[:-1] + b" " * SIZE + b"{",
}  # fmt: skip


# Reads the file under a limit on memory beyond what Python and the modules already take.
READ = f"""
import re, resource, sys, time
from pathlib import Path
from reshard.errors import BadInputError
from reshard.files.header import read_header
taken = int(re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (taken + {MEMORY},) * 2)
start = time.process_time()
try:
    read_header("bomb", file="bomb")
except BadInputError as error:
    print(time.process_time() - start, error.message)
"""


def large_header() -> tuple[bytes, int]:
    """A legal header of as many tensors as one may have, and the size of its file."""
    name, size, count = "model.layers.{}.mlp.experts.{}.down_proj.weight", 4096 * 1536 * 2, ENTRY_LIMIT - 1
    found = {
        name.format(i // 100, i % 100): {
            "dtype": "BF16",
            "shape": [4096, 1536],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(count)
    }
    raw = json.dumps({"__metadata__": {"format": "pt"}, **found}, separators=(",", ":")).encode()
    return raw, 8 + len(raw) + count * size


def cpu_seconds(*calls: Callable[[], object]) -> list[float]:
    """Return the CPU time of each call: the least of five in turns, since other work slows a machine by phases."""
    took: list[list[float]] = [[] for _ in calls]
    gc.collect()
    gc.disable()  # else it goes through all that other tests have left
    try:
        for _ in range(5):
            for call, times in zip(calls, took):
                start = time.process_time()
                call()
                times.append(time.process_time() - start)
    finally:
        gc.enable()
    return [min(times) for times in took]


@pytest.fixture(scope="module")
def header_seconds() -> float:
    """What the largest legal header takes on this machine."""
    raw, size = large_header()
    [seconds] = cpu_seconds(lambda: parse_header(raw, file=FILE, file_size=size))
    return seconds


@pytest.mark.fault(10)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_bomb(name: str, tmp_path: Path, header_seconds: float) -> None:
    """A bomb takes about the time of the largest legal header at most, and 64 MB of memory beside its pages."""
    raw = BOMBS[name]()
    assert len(raw) <= HEADER_LIMIT
    (tmp_path / "bomb").write_bytes(struct.pack("<Q", len(raw)) + raw)
    environment = {**os.environ, "PYTHONPATH": str(Path(reshard.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", READ], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    seconds, _, message = done.stdout.partition(" ")
    assert message.startswith("bomb: "), done
    assert len(message) < 1000
    assert float(seconds) < 4 * header_seconds, seconds


def test_the_largest_header_takes_a_few_times_what_its_json_does() -> None:
    raw, size = large_header()
    ours, json_alone = cpu_seconds(lambda: parse_header(raw, file=FILE, file_size=size), lambda: json.loads(raw))
    assert ours < 12 * json_alone
    assert len(parse_header(raw, file=FILE, file_size=size).tensors) == ENTRY_LIMIT - 1

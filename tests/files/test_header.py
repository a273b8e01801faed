"""The header parser against files that safetensors writes, and against a corpus of malformed ones."""

from __future__ import annotations

import os
import signal
import struct
from pathlib import Path

import pytest
import torch
from header_tools import FILE, entry, fields, join, members, ours, parse, read, refused, theirs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save_file

from reshard.files import header as header_module
from reshard.files.header import DTYPE_BITS, HEADER_LIMIT, TensorInfo, parse_header, read_header

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
UNWRITTEN = {"F4", "F6_E2M3", "F6_E3M2"}  # these codes have no torch dtype of one element
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=4)
METADATA = st.none() | st.dictionaries(
    NAMES, st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=3
)
TENSORS = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), SHAPES), max_size=6)


def tensor(code: str, shape: list[int]) -> torch.Tensor:
    count = int(torch.Size(shape).numel())
    data = torch.arange(count * DTYPE_BITS[code] // 8, dtype=torch.uint8)
    return (data % 2 == 1 if code == "BOOL" else data.view(TORCH_DTYPES[code])).reshape(shape)


def test_dtype_table_is_what_safetensors_accepts() -> None:
    assert set(DTYPE_BITS) == set(TORCH_DTYPES) | UNWRITTEN
    for code, bits in DTYPE_BITS.items():
        for size in (4, 6, 8, 16, 32, 64, 128):
            blob = join(members(entry("w", 0, size, dtype=code, shape="[8]")), bytes(size))
            assert (theirs(blob) is not None) == (ours(blob) is not None) == (size == bits), (code, size)
    message = refused(lambda: parse(join(members(entry("w", 0, 8, dtype="NOPE")), bytes(8))))
    assert "NOPE" in message
    with pytest.raises(SafetensorError) as caught:
        deserialize(join(members(entry("w", 0, 8, dtype="NOPE")), bytes(8)))
    known = str(caught.value).split("expected one of ")[1].split(" at line")[0]
    assert {code.strip("`") for code in known.split(", ")} == set(DTYPE_BITS)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=TENSORS, metadata=METADATA)
def test_round_trip(tmp_path: Path, wanted: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None) -> None:
    path = tmp_path / FILE
    if not wanted and not metadata:
        metadata = None  # safetensors 0.8 writes `{},"__metadata__":{}}` for {} and {}, and refuses to read it
    save_file({name: tensor(*spec) for name, spec in wanted.items()}, path, metadata)
    blob = path.read_bytes()
    found = read_header(path, file=FILE)
    assert found == parse(blob)
    assert found.raw == blob[8 : found.data_start]
    assert {info.name: (info.dtype, list(info.shape)) for info in found.tensors} == wanted
    assert ours(blob) == theirs(blob)
    with safe_open(path, "pt") as reference:
        assert sorted(reference.keys()) == sorted(info.name for info in found.tensors)
        for info in found.tensors:
            piece = reference.get_slice(info.name)
            assert (info.dtype, list(info.shape)) == (piece.get_dtype(), piece.get_shape())
    ends = [found.data_start, *(info.end for info in found.tensors)]
    assert [info.start for info in found.tensors] == ends[:-1]
    assert ends[-1] == len(blob)


def test_packed_float4_of_torch(tmp_path: Path) -> None:
    data = torch.arange(6, dtype=torch.uint8).reshape(2, 3).view(torch.float4_e2m1fn_x2)
    save_file({"w": data}, tmp_path / FILE)
    (info,) = read_header(tmp_path / FILE, file=FILE).tensors
    with safe_open(tmp_path / FILE, "pt") as reference:
        assert list(info.shape) == reference.get_slice("w").get_shape()
    assert (info.dtype, info.nbytes) == ("F4", 6)


ACCEPTED = {
    "no tensors": (b"{}", b""),
    "only metadata": (b'{"__metadata__":{"format":"pt","":""}}', b""),
    "empty metadata": (b'{"__metadata__":{}}', b""),
    "padding": (b"{}      ", b""),
    "json white space": (b'{ \n"a" :\t{"dtype": "U8", "shape": [ 1 ], "data_offsets": [0,\r1]}\n}', b"\0"),
    "0-d": (members(entry("w", 0, 2, dtype="F16", shape="[]")), b"\0\0"),
    "empty name": (members(entry("", 0, 1)), b"\0"),
    "unordered": (members(entry("b", 1, 2), entry("a", 0, 1)), b"\0\0"),
    "empty ones anywhere": (members(entry("z", 1, 1), entry("b", 1, 2), entry("a", 0, 1), entry("e", 2, 2)), bytes(2)),
    "escaped name": (members(entry(r"\u00e9\ud83d\ude00\n", 0, 1)), b"\0"),
    "utf-8 name": (members(entry("é😀", 0, 1)), b"\0"),
    "braces in a name": (members(entry('{}[]\\"', 0, 1)), b"\0"),
    "64 dims": (members(entry("w", 0, 1, shape=f"[{','.join('1' * 64)}]")), b"\0"),
    "64 long dims": (members(entry("w", 0, 0, shape=f"[{2**63 - 1}" + f",\n{' ' * 32}0{' ' * 20}" * 63 + "]")), b""),
    "sub-byte": (members(entry("w", 0, 3, dtype="F6_E2M3", shape="[2,2]")), b"\0\0\0"),
}  # fmt: skip


@pytest.mark.fault(9)
@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str, tmp_path: Path) -> None:
    raw, data = ACCEPTED[name]
    blob = join(raw, data)
    assert read(tmp_path, blob) == parse(blob)
    assert ours(blob) == theirs(blob) is not None


def test_order_and_offsets() -> None:
    raw = members(entry("z", 1, 1), entry("b", 1, 3), entry("a", 0, 1), entry("y", 1, 1)) + b" "
    at = 8 + len(raw)
    found = parse_header(raw, file=FILE, file_size=at + 3)
    assert found.data_start == at
    assert found.tensors == (
        TensorInfo("a", "U8", (1,), FILE, at, at + 1),
        TensorInfo("z", "U8", (0,), FILE, at + 1, at + 1),
        TensorInfo("y", "U8", (0,), FILE, at + 1, at + 1),
        TensorInfo("b", "U8", (2,), FILE, at + 1, at + 3),
    )
    assert [info.nbytes for info in found.tensors] == [1, 0, 0, 2]


# --- malformed: the JSON, the data, and a word that the message must hold ---


ONE = '"dtype":"U8","shape":[1],"data_offsets":[0,1]'
BIG = str(2**63)
MALFORMED: dict[str, tuple[bytes, bytes, str]] = {
    "no header": (b"", b"", "length 0"),
    "no object": (b"[]", b"", "object"),
    "leading space": (b" {}", b"", "object"),
    "byte order mark": (b"\xef\xbb\xbf{}", b"", "object"),
    "utf-16": ("{}".encode("utf-16-le"), b"", "string"),
    "invalid utf-8": (b'{"__metadata__":{"a":"\xff"}}', b"", "utf-8"),
    "utf-8 surrogate": (b'{"__metadata__":{"a":"\xed\xa0\x80"}}', b"", "utf-8"),
    "lone surrogate in a name": (members(entry(r"\ud800", 0, 1)), b"\0", "surrogates"),
    "lone surrogate in metadata": (rb'{"__metadata__":{"a":"\udc00"}}', b"", "surrogates"),
    "control character": (b'{"__metadata__":{"a":"\x01"}}', b"", "control character"),
    "unclosed": (b"{", b"", "string"),
    "unclosed entry": (b'{"w":{' + ONE.encode(), b"\0", "w: "),
    "comma at the end": (members(entry("w", 0, 1), b""), b"\0", "string"),
    "comma in an entry": (fields(ONE + ","), b"\0", "w: "),
    "no comma": (b"{" + entry("a", 0, 1) + entry("b", 1, 2) + b"}", b"\0\0", "','"),
    "no colon": (b'{"w"{}}', b"", "':'"),
    "number as key": (b"{1:2}", b"", "string"),
    "single quotes": (b"{'w':{}}", b"", "string"),
    "form feed": (b"{\x0c}", b"", "string"),
    "no-break space": ("{\u00a0}".encode(), b"", "string"),
    "null after": (b"{}\0", b"", "spaces"),
    "newline after": (b"{}\n", b"", "spaces"),
    "object after": (b"{}{}", b"", "spaces"),
    "comment": (b"{/**/}", b"", "string"),
    "same name twice": (members(entry("w", 0, 1), entry("w", 1, 2)), b"\0\0", "duplicate key 'w'"),
    "same entry twice": (members(entry("w", 0, 1), entry("w", 0, 1)), b"\0", "duplicate"),
    "same name, escaped": (members(entry("w", 0, 1), entry(r"\u0077", 1, 2)), b"\0\0", "duplicate"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', b"", "duplicate"),
    "metadata key twice": (b'{"__metadata__":{"a":"1","a":"2"}}', b"", "duplicate key 'a'"),
    "field twice": (fields(ONE + ',"dtype":"U8"'), b"\0", "w: "),
    "field instead of another": (fields('"dtype":"U8","dtype":"U8","data_offsets":[0,1]'), b"\0", "once"),
    "metadata null": (b'{"__metadata__":null}', b"", "__metadata__"),
    "metadata list": (b'{"__metadata__":[]}', b"", "__metadata__"),
    "metadata number": (b'{"__metadata__":{"a":1}}', b"", "__metadata__"),
    "metadata nested": (b'{"__metadata__":{"a":{}}}', b"", "__metadata__"),
    "metadata null value": (b'{"__metadata__":{"a":null}}', b"", "__metadata__"),
    "entry a list": (b'{"w":["U8",[1],[0,1]]}', b"\0", "w: "),
    "entry null": (b'{"w":null}', b"", "w: "),
    "entry empty": (b'{"w":{}}', b"", "w: "),
    "entry nested": (fields(ONE + ',"more":{}'), b"\0", "w: "),
    "field more": (fields(ONE + ',"more":1'), b"\0", "more"),
    "field less": (fields('"dtype":"U8","shape":[1]'), b"\0", "data_offsets"),
    "dtype unknown": (fields('"dtype":"F128","shape":[1],"data_offsets":[0,16]'), bytes(16), "F128"),
    "dtype lower case": (fields('"dtype":"u8","shape":[1],"data_offsets":[0,1]'), b"\0", "u8"),
    "dtype null": (fields('"dtype":null,"shape":[1],"data_offsets":[0,1]'), b"\0", "None"),
    "dtype list": (fields('"dtype":["U8"],"shape":[1],"data_offsets":[0,1]'), b"\0", "dtype"),
    "shape null": (fields('"dtype":"U8","shape":null,"data_offsets":[0,1]'), b"\0", "shape"),
    "shape a number": (fields('"dtype":"U8","shape":1,"data_offsets":[0,1]'), b"\0", "shape"),
    "shape a string": (fields('"dtype":"U8","shape":"1","data_offsets":[0,1]'), b"\0", "shape"),
    "dim a boolean": (fields('"dtype":"U8","shape":[true],"data_offsets":[0,1]'), b"\0", "True"),
    "dim a string": (fields('"dtype":"U8","shape":["1"],"data_offsets":[0,1]'), b"\0", "'1'"),
    "dim a list": (fields('"dtype":"U8","shape":[[1]],"data_offsets":[0,1]'), b"\0", "[[1]]"),
    "dim a float": (fields('"dtype":"U8","shape":[1.0],"data_offsets":[0,1]'), b"\0", "1.0"),
    "dim an exponent": (fields('"dtype":"U8","shape":[1e3],"data_offsets":[0,1000]'), bytes(1000), "1e3"),
    "dim NaN": (fields('"dtype":"U8","shape":[NaN],"data_offsets":[0,1]'), b"\0", "NaN"),
    "dim Infinity": (fields('"dtype":"U8","shape":[Infinity],"data_offsets":[0,1]'), b"\0", "Infinity"),
    "dim -Infinity": (fields('"dtype":"U8","shape":[-Infinity],"data_offsets":[0,1]'), b"\0", "minus"),
    "dim negative": (fields('"dtype":"U8","shape":[-1],"data_offsets":[0,1]'), b"\0", "minus"),
    "dims negative": (fields('"dtype":"U8","shape":[-1,-1],"data_offsets":[0,1]'), b"\0", "minus"),
    "dim minus zero": (fields('"dtype":"U8","shape":[-0],"data_offsets":[0,0]'), b"", "minus"),
    "dim with a leading zero": (fields('"dtype":"U8","shape":[01],"data_offsets":[0,1]'), b"\0", "w: "),
    "dim in other digits": (fields('"dtype":"U8","shape":[١],"data_offsets":[0,1]'), b"\0", "w: "),
    "dim of 2**63": (fields(f'"dtype":"U8","shape":[{BIG},0],"data_offsets":[0,0]'), b"", "2**63"),
    "dims of 2**64": (fields(f'"dtype":"U8","shape":[{2**32},{2**32},0],"data_offsets":[0,0]'), b"", "2**63"),
    "0 before dims of 2**64": (fields(f'"dtype":"U8","shape":[0,{2**32},{2**32}],"data_offsets":[0,0]'), b"", "2**63"),
    "bits of 2**64": (fields(f'"dtype":"U8","shape":[{2**61}],"data_offsets":[0,{2**61}]'), b"", "2**63"),
    "dims wrap to 1": (fields(f'"dtype":"U8","shape":[{2**64 + 1}],"data_offsets":[0,1]'), b"\0", "w: "),
    "dim of 4000 digits": (fields(f'"dtype":"U8","shape":[{"9" * 4000}],"data_offsets":[0,1]'), b"\0", "w: "),
    "dim of 5000 digits": (fields(f'"dtype":"U8","shape":[{"9" * 5000}],"data_offsets":[0,1]'), b"\0", "w: "),
    "65 dims": (members(entry("w", 0, 1, shape=f"[{','.join('1' * 65)}]")), b"\0", "64"),
    "offsets null": (fields('"dtype":"U8","shape":[1],"data_offsets":null'), b"\0", "data_offsets"),
    "one offset": (fields('"dtype":"U8","shape":[0],"data_offsets":[0]'), b"", "data_offsets"),
    "three offsets": (fields('"dtype":"U8","shape":[1],"data_offsets":[0,1,1]'), b"\0", "data_offsets"),
    "offset a boolean": (fields('"dtype":"U8","shape":[1],"data_offsets":[0,true]'), b"\0", "data_offsets"),
    "offset a float": (fields('"dtype":"U8","shape":[1],"data_offsets":[0,1.0]'), b"\0", "data_offsets"),
    "offset negative": (fields('"dtype":"U8","shape":[1],"data_offsets":[-1,0]'), b"\0", "minus"),
    "offset minus zero": (fields('"dtype":"U8","shape":[1],"data_offsets":[-0,1]'), b"\0", "minus"),
    "offsets reversed": (members(entry("w", 1, 0, shape="[1]")), b"\0", "[1, 0]"),
    "offsets of 2**64": (fields(f'"dtype":"U8","shape":[0],"data_offsets":[{2**64},{2**64}]'), b"", "w: "),
    "too few bytes": (members(entry("w", 0, 3, dtype="F32", shape="[1]")), b"\0\0\0", "8 * 3"),
    "too many bytes": (members(entry("w", 0, 5, dtype="F32", shape="[1]")), b"\0\0\0\0\0", "8 * 5"),
    "half a byte": (members(entry("w", 0, 1, dtype="F4", shape="[1]")), b"\0", "4 bits"),
    "a byte and a half": (members(entry("w", 0, 2, dtype="F4", shape="[3]")), b"\0\0", "12 bits"),
    "half a byte cut off": (members(entry("w", 0, 1, dtype="F4", shape="[3]")), b"\0", "12 bits"),
    "hole at the start": (members(entry("w", 1, 2)), b"\0\0", "w: "),
    "hole": (members(entry("a", 0, 1), entry("w", 2, 3)), b"\0\0\0", "w: "),
    "overlap": (members(entry("a", 0, 2), entry("w", 1, 3)), b"\0\0\0", "w: "),
    "same place": (members(entry("a", 0, 1), entry("w", 0, 1)), b"\0", "w: "),
    "empty tensor inside another": (members(entry("a", 0, 2), entry("w", 1, 1)), b"\0\0", "w: "),
    "empty tensor past the end": (members(entry("w", 1, 1)), b"", "w: "),
    "data cut": (members(entry("w", 0, 2)), b"\0", "file of"),
    "data too long": (members(entry("w", 0, 2)), b"\0\0\0", "file of"),
    "data without tensors": (b"{}", b"\0", "file of"),
    "nested lists": (fields(f'"dtype":"U8","shape":{"[" * 2000}{"]" * 2000},"data_offsets":[0,1]'), b"\0", "w: "),
    "nested objects": (b'{"w":' * 5000, b"", "w: "),
    "hostile name": (members(entry(r"\u202e\n\u001b[31m", 0, 2)[:-2] + b"}"), b"\0\0", r"\u202e\n\x1b[31m"),
}


@pytest.mark.fault(9)
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name: str, tmp_path: Path) -> None:
    raw, data, word = MALFORMED[name]
    message = refused(lambda: read(tmp_path, join(raw, data)))
    assert word in message
    if raw:
        assert refused(lambda: parse(join(raw, data))) == message


LENGTHS = {
    "0": 0,
    "one more than the file": 3,
    "one more than the limit": HEADER_LIMIT + 1,
    "2**63": 2**63,
    "2**64-1": 2**64 - 1,
}


@pytest.mark.fault(9)
@pytest.mark.parametrize("name", LENGTHS)
def test_header_length(name: str, tmp_path: Path) -> None:
    blob = struct.pack("<Q", LENGTHS[name]) + b"{}"
    assert str(LENGTHS[name]) in refused(lambda: read(tmp_path, blob))
    assert theirs(blob) is None


def test_header_limit_in_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(struct.pack("<Q", HEADER_LIMIT + 1) + b"{}")
    os.truncate(path, HEADER_LIMIT + 100)
    assert str(HEADER_LIMIT) in refused(lambda: read_header(path, file=FILE))


def test_entry_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_module, "ENTRY_LIMIT", 3)
    three = [entry(name, 0, 0) for name in "abc"]
    assert len(parse(join(members(*three))).tensors) == 3
    assert "more than 3" in refused(lambda: parse(join(members(*three, entry("d", 0, 0)))))
    escaped = [part.replace(b"offsets", rb"\u006fffsets") for part in [*three, entry("d", 0, 0)]]
    assert "more than 3" in refused(lambda: parse(join(members(*escaped))))
    keys = b",".join(b'"%d":""' % key for key in range(4))
    assert "more than 3" in refused(lambda: parse(join(b'{"__metadata__":{' + keys + b"}}")))


# --- what is no regular file ---


@pytest.mark.fault(12)
def test_fifo_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / FILE
    os.mkfifo(path)
    signal.alarm(10)  # ends the test run if the call blocks
    try:
        assert "regular file" in refused(lambda: read_header(path, file=FILE))
    finally:
        signal.alarm(0)


@pytest.mark.fault(12)
def test_folder_missing_and_device(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    refused(lambda: read_header(tmp_path / FILE, file=FILE))
    assert "No such file" in refused(lambda: read_header(tmp_path / "missing", file=FILE))
    assert "regular file" in refused(lambda: read_header("/dev/zero", file=FILE))


def test_reads_the_header_only(tmp_path: Path) -> None:
    """The file is a sparse terabyte: reading its data would not end."""
    raw = members(entry("w", 0, 2**40))
    path = tmp_path / FILE
    path.write_bytes(join(raw))
    try:
        os.truncate(path, 8 + len(raw) + 2**40)
    except OSError:
        pytest.skip("no sparse files of this size here")
    assert read_header(path, file=FILE).tensors[0].nbytes == 2**40

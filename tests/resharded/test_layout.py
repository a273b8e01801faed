"""Rank files before they are written: safetensors and torch's checkpoint reader understand `file_layout`'s result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cutting import bits, random_bits, same
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.distributed.checkpoint.api import CheckpointException

from reshard.errors import BadInputError
from reshard.files import header as header_module
from reshard.files.dtypes import CODES, NAMES, itemsize
from reshard.files.header import read_header
from reshard.resharded import layout as layout_module
from reshard.resharded.layout import ALIGNMENT, FileLayout, file_layout, rank_file_name
from reshard.resharded.targets import LocalTensor, Target, rank_tensors
from reshard.sharding.placement import PackedShard, Placement, Replicate, Shard
from reshard.sharding.regions import whole

# safetensors cannot give torch these dtypes; their layout is that of others of the same size
DTYPES = [name for code, name in NAMES.items() if code not in ("F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")]


def local(name: str, shape: Sequence[int], dtype: str) -> LocalTensor:
    return LocalTensor(name, tuple(shape), dtype, (0,) * len(shape), ())


def data_of(tensor: LocalTensor) -> torch.Tensor:
    if tensor.dtype == "complex64":
        return torch.view_as_complex(random_bits((*tensor.shape, 2), torch.float32).contiguous())
    return random_bits(tensor.shape, getattr(torch, tensor.dtype))


def write(layout: FileLayout, path: Path) -> None:
    """Write the file of a layout, with each tensor's data at its slot."""
    content = bytearray(layout.size)
    content[: len(layout.head)] = layout.head
    for slot in layout.slots:
        raw = bytes(data_of(slot.tensor).contiguous().reshape(-1).view(torch.uint8).numpy())
        content[slot.offset : slot.offset + len(raw)] = raw
    assert len(content) == layout.size
    path.write_bytes(content)


def header_of(layout: FileLayout) -> dict:
    return json.loads(layout.head[8:])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=8), st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES)),
        max_size=8,
        unique_by=lambda item: item[0],
    )
)
def test_a_written_layout_is_a_safetensors_file(
    tmp_path_factory: pytest.TempPathFactory, items: list[tuple[str, list[int], str]]
) -> None:
    tensors = [local(*item) for item in items]
    layout = file_layout("a.safetensors", tensors)
    path = tmp_path_factory.getbasetemp() / "layout.safetensors"
    write(layout, path)

    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {tensor.name for tensor in tensors}
        for tensor in tensors:
            found = file.get_tensor(tensor.name)
            if tensor.dtype == "complex64":
                found, expected = torch.view_as_real(found), torch.view_as_real(data_of(tensor))
            else:
                expected = data_of(tensor)
            assert tuple(found.shape[: len(tensor.shape)]) == tensor.shape
            assert same(found, expected)

    header = read_header(path, file="a.safetensors")  # our own parser, stricter than the library's
    assert header.data_start == len(layout.head)
    assert [(info.name, info.start, info.end, info.dtype) for info in header.tensors if info.nbytes] == [
        (slot.tensor.name, slot.offset, slot.offset + slot.tensor.nbytes, CODES[slot.tensor.dtype])
        for slot in layout.slots
        if slot.tensor.nbytes
    ]
    assert len(layout.head) % ALIGNMENT == 0
    assert all(slot.offset % itemsize(slot.tensor.dtype) == 0 for slot in layout.slots)


def test_data_starts_on_a_page_and_larger_elements_come_first() -> None:
    tensors = [
        local("a", (3,), "bool"),
        local("b", (1,), "int64"),
        local("c", (3,), "bfloat16"),
        local("d", (), "int8"),
    ]
    layout = file_layout("x", tensors)
    assert [slot.tensor.name for slot in layout.slots] == ["b", "c", "a", "d"]
    assert [slot.offset - 4096 for slot in layout.slots] == [0, 8, 14, 17]
    assert layout.size == 4096 + 18
    assert len(layout.head) == 4096


def test_order_given_is_kept_among_equal_sizes() -> None:
    layout = file_layout("x", [local(name, (2,), dtype) for name, dtype in zip("dbca", ["float32", "int32"] * 2)])
    assert [slot.tensor.name for slot in layout.slots] == ["d", "b", "c", "a"]


def test_a_file_of_no_tensors_is_its_header() -> None:
    layout = file_layout("x", [])
    assert (layout.size, layout.slots) == (4096, ())


def test_bytes_are_deterministic() -> None:
    tensors = [local(f"t{i}", (i,), "float32") for i in range(20)]
    names = frozenset(tensor.name for tensor in tensors)
    again = frozenset(sorted(names, reverse=True))
    assert file_layout("x", tensors, boxes=names) == file_layout("x", list(tensors), boxes=again)


def test_rank_file_names_are_torchs() -> None:
    assert [rank_file_name(rank) for rank in (0, 9)] == [
        "shard-00001-model-00001-of-00001.safetensors",
        "shard-00010-model-00001-of-00001.safetensors",
    ]


PLACEMENTS: dict[str, tuple[tuple[int, ...], Placement]] = {
    "rows": ((7, 3), Shard(0)),
    "columns": ((3, 5), Shard(1)),
    "few": ((2, 2), Shard(0)),  # the third rank is empty
    "packed": ((8, 2), PackedShard(0, (4, 4))),
    "norm": ((4,), Replicate()),
    "scale": ((), Replicate()),
}


def rank_layouts(world_size: int, *, packed: bool = True) -> list[FileLayout]:
    targets = [
        Target(name, shape, "float32", where, whole(name, shape))
        for name, (shape, where) in PLACEMENTS.items()
        if packed or name != "packed"
    ]
    rectangles = frozenset(PLACEMENTS) - {"packed"}
    return [
        file_layout(rank_file_name(rank), rank_tensors(targets, rank=rank, world_size=world_size), boxes=rectangles)
        for rank in range(world_size)
    ]


def test_plain_boxes_are_described_to_torchs_checkpoint() -> None:
    for rank, layout in enumerate(rank_layouts(3)):
        metadata = header_of(layout)["__metadata__"]
        assert metadata["format"] == "pt"
        assert metadata["DCP_VERSION"] == "1.0"
        offsets = {name: item["saved_offsets"] for name, item in json.loads(metadata["DCP_SHARDING_INFO"]).items()}
        assert offsets == {
            "rows": [min(3 * rank, 7), 0],
            "columns": [0, 2 * rank],
            "few": [min(rank, 2), 0],
            "norm": [0],
            "scale": [],
        }


def test_without_boxes_there_is_no_such_metadata() -> None:
    assert header_of(file_layout("x", [local("a", (1,), "int8")]))["__metadata__"] == {"format": "pt"}


def load_with_dcp(folder: Path, layouts: list[FileLayout], wholes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Write the rank files, and let torch's distributed checkpoint join them in one process."""
    import torch.distributed.checkpoint as dcp

    for layout in layouts:
        content = bytearray(layout.head.ljust(layout.size, b"\0"))
        for slot in layout.slots:
            tensor = slot.tensor
            for region in tensor.regions if tensor.name in wholes else ():
                part = torch.as_strided(wholes[region.source], region.extent, region.strides, region.offset)
                content[slot.offset : slot.offset + tensor.nbytes] = part.contiguous().numpy().tobytes()
        (folder / layout.name).write_bytes(content)
    state = {name: torch.zeros_like(tensor) for name, tensor in wholes.items()}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    return state


@pytest.mark.filterwarnings("ignore")
def test_torchs_checkpoint_reader_joins_the_rank_files(tmp_path: Path) -> None:
    wholes = {name: torch.randn(shape) for name, (shape, _) in PLACEMENTS.items() if name != "packed"}
    state = load_with_dcp(tmp_path, rank_layouts(3, packed=False), wholes)
    for name, tensor in wholes.items():
        assert torch.equal(bits(state[name]), bits(tensor)), name


@pytest.mark.filterwarnings("ignore")
def test_torchs_checkpoint_reader_refuses_what_it_would_misread(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match="packed"):
        load_with_dcp(tmp_path, rank_layouts(3), {"rows": torch.randn(7, 3)})


@pytest.mark.parametrize(
    ("count", "length", "boxed"),
    [(49, 20, False), (50, 20, False), (40, 98, False), (40, 120, False), (20, 150, True), (20, 190, True)],
)
def test_what_is_laid_out_can_be_read(
    count: int, length: int, boxed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is refused before it is written if nobody would read its header: for the number of tensors, for their
    names, or for what torch's checkpoint reader is told of each."""
    for module in (layout_module, header_module):
        monkeypatch.setattr(module, "ENTRY_LIMIT", 50)
        monkeypatch.setattr(module, "TEXT_LIMIT", 4096)
    names = [f"{number:0{length}}" for number in range(count)]
    tensors = [local(name, (0,), "float32") for name in names]
    boxes = frozenset(names) if boxed else None
    if (count, length) in ((50, 20), (40, 120), (20, 190)):
        with pytest.raises(BadInputError, match=f"f: would have {count} tensors, more than a header can hold"):
            file_layout("f", tensors, boxes=boxes)
        if boxed:
            return  # the reader looks at up to 64 KiB of a string at once, and would take so short a one
        with monkeypatch.context() as patch:
            patch.setattr(layout_module, "ENTRY_LIMIT", 100)
            patch.setattr(layout_module, "TEXT_LIMIT", 1 << 20)
            write(file_layout("f", tensors, boxes=boxes), tmp_path / "f")
        with pytest.raises(BadInputError):
            read_header(tmp_path / "f", file="f")
        return
    write(file_layout("f", tensors, boxes=boxes), tmp_path / "f")
    assert len(read_header(tmp_path / "f", file="f").tensors) == count

"""The layout of a rank file: its safetensors header, and the byte offset of each tensor. No files, no torch."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint.source import Source
from ..errors import BadInputError
from ..files.dtypes import CODES, itemsize
from ..files.header import ENTRY_LIMIT, HEADER_LIMIT, TEXT_LIMIT
from ..sharding.placement import is_box
from .targets import LocalTensor, Target, rank_tensors, unused_tensors

__all__ = ["ALIGNMENT", "UNUSED_NAME", "FileLayout", "Slot", "file_layout", "file_layouts", "rank_file_name"]

ALIGNMENT = 4096  # bytes: tensor data starts on a page, so a file can be mapped or read directly
UNUSED_NAME = "unused.safetensors"


def rank_file_name(rank: int) -> str:
    """Return the name that torch's `HuggingFaceStorageWriter` gives a rank's only file (`_hf_utils._gen_file_name`)."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor and the byte offset in the file where its data starts."""

    tensor: LocalTensor
    offset: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A file before it is written. `head` is everything before the tensor data; `size` is in bytes."""

    name: str
    head: bytes
    slots: tuple[Slot, ...]
    size: int


def file_layout(
    name: str,
    tensors: Iterable[LocalTensor],
    *,
    boxes: frozenset[str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> FileLayout:
    """Lay out one file: larger elements first so that all are aligned, otherwise in the order given.

    `boxes` names the tensors that are plain boxes of the global tensor; the metadata describes them to torch's
    distributed checkpoint, which refuses the others instead of misreading them. None leaves that out. `metadata` is
    what the file says besides.
    """
    ordered = sorted(tensors, key=lambda tensor: -itemsize(tensor.dtype))
    metadata = {**(metadata or {}), "format": "pt"}
    if boxes is not None:
        metadata["DCP_VERSION"] = "1.0"
        metadata["DCP_SHARDING_INFO"] = json.dumps(
            {tensor.name: {"saved_offsets": list(tensor.start)} for tensor in ordered if tensor.name in boxes}
        )
    entries: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for tensor in ordered:
        entries[tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    _check_head(name, entries, metadata, len(text))
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    slots, offset = [], len(head)
    for tensor in ordered:
        slots.append(Slot(tensor, offset))
        offset += tensor.nbytes
    return FileLayout(name, head, tuple(slots), offset)


def _check_head(name: str, entries: Mapping[str, object], metadata: Mapping[str, str], size: int) -> None:
    """Raise BadInputError if the header of a file is one that nobody would read."""
    strings = (list(entries), *metadata.values())
    if (
        len(entries) > ENTRY_LIMIT
        or max(len(json.dumps(string)) for string in strings) > TEXT_LIMIT
        or size > HEADER_LIMIT - ALIGNMENT
    ):
        raise BadInputError(
            f"{name}: would have {len(entries) - 1:,} tensors, more than a header can hold",
            hint="more ranks for whole experts (--ep-size) make it fewer",
        )


def file_layouts(
    targets: Sequence[Target],
    world_size: int,
    source: Source,
    unused: Iterable[str] = (),
    *,
    filled: Container[int] | None = None,
) -> list[FileLayout]:
    """Lay out every file of a folder: one for each rank, and one for the `unused` tensors of `source` if there are
    any. Files of ranks that are not to be `filled` cannot be, and cost little; None fills all."""
    rectangles = frozenset(target.name for target in targets if world_size == 1 or is_box(target.placement))
    layouts = []
    for rank in range(world_size):
        sizes_only = filled is not None and rank not in filled
        tensors = rank_tensors(targets, rank=rank, world_size=world_size, sizes_only=sizes_only)
        layouts.append(file_layout(rank_file_name(rank), tensors, boxes=rectangles))
    apart = unused_tensors(source, unused)
    return [*layouts, file_layout(UNUSED_NAME, apart)] if apart else layouts

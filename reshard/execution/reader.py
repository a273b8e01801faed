"""The source files, mapped: any region as a view, any target tensor as a stream of blocks.

torch is imported when it is first needed: to cast, or once there have been many short runs to gather. Until then, runs
are copied as bytes.
"""

from __future__ import annotations

import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..checkpoint.source import Source
from ..files.dtypes import itemsize, torch_name
from ..files.mapped import MappedFile, check_unchanged
from ..process import BLOCK_BYTES
from ..resharded.derived import Computed, read_regions
from ..resharded.targets import LocalTensor
from ..sharding.placement import Piece
from ..sharding.regions import Box, Region, boxes, cut, is_run, run_length, run_starts
from ..storage.prefetch import Arrivals

if TYPE_CHECKING:
    import torch

__all__ = ["SourceReader", "equal_tensors", "tensor_blocks"]

_FILE_PIECE = 64 << 20
# Data is moved as integers of the same width: bits survive whatever they mean, and every dtype has a copy kernel.
_BITS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}
# Python takes as long for a run as for the copy of a few kilobytes. torch takes less, but a second or more to import.
_LONG = 16 << 10  # bytes of a run that Python copies quickly
_FEW = 1 << 20  # runs that Python copies in the time of the import

# The mapping is read-only and so are our views of it.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)


class SourceReader:
    """The source files, mapped. Mapped pages belong to the page cache: they are not this process's memory.

    Files that are still to come are waited for in `arrivals`, until the work is `given_up`; nobody else uses them.
    Tensors that are `computed` are in no file: a region of one is computed when it is asked for.

    Leaving the context raises IntegrityError if a source file has changed since it was opened. It replaces any other
    error, which would be about bytes nobody wrote.
    """

    def __init__(
        self,
        source: Source,
        arrivals: Arrivals | None = None,
        given_up: Callable[[], bool] = lambda: False,
        *,
        computed: Mapping[str, Computed] | None = None,
    ) -> None:
        self._source, self._arrivals, self._given_up = source, arrivals, given_up
        self._computed = computed or {}
        self._maps: dict[str, MappedFile] = {}
        self._short_runs = 0
        self._lock = threading.Lock()

    def __enter__(self) -> SourceReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        maps = list(self._maps.values())
        self._maps.clear()  # views may still be alive: each map closes with its last view
        if kind is None or issubclass(kind, Exception):
            for mapped in maps:
                mapped.check()
            for file in self._source.files if self._arrivals is None else ():
                check_unchanged(file.path, size=file.size, mtime_ns=file.mtime_ns)

    def _map(self, name: str) -> memoryview:
        mapped = self._maps.get(name)
        if mapped is None:
            file = self._source.file(name)
            path = self._arrivals.wait(name, self._given_up) if self._arrivals else file.path
            with self._lock:
                mapped = self._maps.get(name) or MappedFile(
                    path, size=file.size, mtime_ns=None if self._arrivals else file.mtime_ns
                )
                self._maps[name] = mapped
        if mapped.shrunk:  # the rest of the work would be in vain
            mapped.check()
        return mapped.data

    def release(self, name: str) -> None:
        """Let go of a file that nobody reads any more: its mapping, and the file too if it came for this."""
        with self._lock:
            mapped = self._maps.pop(name, None)
        if mapped is not None:
            mapped.check()
        if self._arrivals:
            self._arrivals.done(name)

    def view(self, region: Region, *, bits: bool) -> torch.Tensor:
        """Return the region's elements, if `bits` as same-width integers: a strided view of the mapped file, or of the
        box of a computed tensor that the region is in."""
        import torch

        made = self._computed.get(region.source)
        if made is None:
            return self._stored(region, bits=bits)
        (top, bottom, left, right), within = _box_around(region, made.grid[1])
        found = made.make(partial(self._input, made.inputs), top, bottom, left, right).contiguous()
        if bits:
            found = found.view(getattr(torch, _BITS[found.element_size()]))
        return found.as_strided(within.extent, within.strides, found.storage_offset() + within.offset)

    def box(self, tensor: LocalTensor, start: Sequence[int], extent: Sequence[int]) -> torch.Tensor:
        """Return a box of a tensor that is filled from files, in its dtype. It is a view if it is one region of it."""
        import torch

        piece = Piece(tuple(start), tuple(extent), (0,) * len(extent))
        inside = cut(_near(tensor.regions, piece.start, piece.extent), piece)
        if len(inside) == 1 and self._stored_dtype(inside[0]) == tensor.dtype:
            return self._stored(inside[0], bits=False)
        found = torch.empty(piece.extent, dtype=getattr(torch, tensor.dtype))
        for region in inside:
            index = tuple(slice(at, at + size) for at, size in zip(region.target_start, region.extent))
            found[index].copy_(self._stored(region, bits=False))
        return found

    def _input(
        self, inputs: Sequence[LocalTensor], number: int, start: Sequence[int], extent: Sequence[int]
    ) -> torch.Tensor:
        return self.box(inputs[number], start, extent)

    def _stored(self, region: Region, *, bits: bool) -> torch.Tensor:
        import torch

        info = self._source.tensors[region.source]
        name = torch_name(info.dtype, tensor=info.name)
        width = itemsize(name)
        last = sum((size - 1) * stride for size, stride in zip(region.extent, region.strides))
        dtype = getattr(torch, _BITS[width] if bits else name)
        flat = torch.frombuffer(
            self._map(info.file), dtype=dtype, count=last + 1, offset=info.start + region.offset * width
        )
        return flat.as_strided(region.extent, region.strides)

    def bytes_of(self, region: Region) -> memoryview:
        """Return the bytes of a region that is one contiguous run."""
        info = self._source.tensors[region.source]
        width = itemsize(torch_name(info.dtype, tensor=info.name))
        start = info.start + region.offset * width
        return self._map(info.file)[start : start + region.size * width]

    def copies_runs(self, region: Region, shape: Sequence[int]) -> bool:
        """Whether to copy a region, into a target of `shape`, run by run and not with torch: torch is not here, and
        there have not been enough short runs to import it for them."""
        if _torch_is_here() or self.computes(region):
            return False
        length = run_length(region, shape)
        if length * itemsize(self.dtype(region)) >= _LONG:
            return True
        self._short_runs += region.size // length
        return self._short_runs <= _FEW

    def copy_runs(self, region: Region, shape: Sequence[int], block: memoryview) -> None:
        """Copy the region's elements, as they are, to their places in `block`: a C-ordered target of `shape`."""
        info = self._source.tensors[region.source]
        width = itemsize(torch_name(info.dtype, tensor=info.name))
        data = self._map(info.file)[info.start :]
        size = run_length(region, shape) * width
        for start, at in zip(*run_starts(region, shape, width=width)):
            block[at : at + size] = data[start : start + size]

    def pieces_of_file(self, name: str, start: int, end: int) -> Iterator[memoryview]:
        """Yield the bytes of a source file from `start` to `end`, in order."""
        for at in range(start, end, _FILE_PIECE):
            yield self._map(name)[at : min(at + _FILE_PIECE, end)]

    def check(self, tensor: LocalTensor) -> None:
        """Raise IntegrityError if a file that `tensor` is made of has changed since it was opened."""
        found = read_regions(tensor.regions, self._computed)
        for name in {self._source.tensors[region.source].file for region in found}:
            if (mapped := self._maps.get(name)) is not None:
                mapped.check()

    def computes(self, region: Region) -> bool:
        """Whether a region is of a tensor that is in no file."""
        return region.source in self._computed

    def dtype(self, region: Region) -> str:
        """Return the dtype that a region is read in (torch's name)."""
        made = self._computed.get(region.source)
        return self._stored_dtype(region) if made is None else made.dtype

    def _stored_dtype(self, region: Region) -> str:
        info = self._source.tensors[region.source]
        return torch_name(info.dtype, tensor=info.name)


def tensor_blocks(tensor: LocalTensor, reader: SourceReader, buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the bytes of a tensor in order: (offset in bytes, block). A block lives until the next one is asked for.

    Contiguous runs of the source come straight from its mapping; what must be gathered or cast uses `buffer`, so memory
    is `len(buffer)` whatever the tensor's size.
    """
    width = itemsize(tensor.dtype)
    for box in boxes(tensor.shape, len(buffer) // width):
        near = _near(tensor.regions, box.start, box.extent)
        inside = cut(near, Piece(box.start, box.extent, (0,) * len(box.extent)))
        only = inside[0]
        if len(inside) == 1 and is_run(only) and reader.dtype(only) == tensor.dtype and not reader.computes(only):
            yield box.offset * width, reader.bytes_of(only)
            continue
        block = buffer[: box.size * width]
        _gather(inside, box, tensor.dtype, reader, block)
        yield box.offset * width, block


def _box_around(region: Region, width: int) -> tuple[tuple[int, int, int, int], Region]:
    """Return the box of a grid of rows of `width` entries that a region's elements are in, as rows and entries, and the
    region within this box."""
    top, left = divmod(region.offset, width)
    steps = [stride if size > 1 else 0 for size, stride in zip(region.extent, region.strides)]
    down = sum((size - 1) * (step // width) for size, step in zip(region.extent, steps) if step % width == 0)
    across = sum((size - 1) * step for size, step in zip(region.extent, steps) if step % width)
    if left + across < width:
        of_box = tuple(step // width * (across + 1) if step % width == 0 else step for step in steps)
        box, offset = (top, top + down + 1, left, left + across + 1), 0
    else:  # it goes from one row into the next
        of_box, offset = tuple(steps), left
        box = (top, top + (left + down * width + across) // width + 1, 0, width)
    return box, Region(region.source, offset, of_box, region.extent, region.target_start)


def _near(regions: Sequence[Region], start: Sequence[int], extent: Sequence[int]) -> Sequence[Region]:
    """Return the regions that can meet the first dim of a box: fused experts have hundreds, and a block spans few."""
    if len(regions) == 1 or not start:
        return regions
    low, high = start[0], start[0] + extent[0]
    return [r for r in regions if r.target_start[0] < high and r.target_start[0] + r.extent[0] > low]


def _gather(regions: Sequence[Region], box: Box, dtype: str, reader: SourceReader, block: memoryview) -> None:
    bits = all(reader.dtype(region) == dtype for region in regions)
    if bits and all(reader.copies_runs(region, box.extent) for region in regions):
        for region in regions:
            reader.copy_runs(region, box.extent, block)
    else:
        _copy_elements(regions, box, dtype, reader, block, bits=bits)


def _torch_is_here() -> bool:
    return "torch" in sys.modules


def _copy_elements(
    regions: Sequence[Region], box: Box, dtype: str, reader: SourceReader, block: memoryview, *, bits: bool
) -> None:
    """Copy the elements of regions to their places in a block, each cast to `dtype` unless they have its `bits`."""
    import torch

    kind = getattr(torch, _BITS[itemsize(dtype)] if bits else dtype)
    target = torch.frombuffer(block, dtype=kind).view(box.extent)
    for region in regions:
        index = tuple(slice(start, start + size) for start, size in zip(region.target_start, region.extent))
        target[index].copy_(reader.view(region, bits=bits))


def equal_tensors(source: Source, one: str, other: str, *, arrivals: Arrivals | None = None) -> bool:
    """Whether two source tensors hold the same bytes, read in blocks."""
    a, b = source.tensors[one], source.tensors[other]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if 0 in a.shape:
        return True
    if arrivals:
        arrivals.ask(a.file)
        arrivals.ask(b.file)
    with SourceReader(source, arrivals) as reader:
        size = math.prod(a.shape)
        width = a.nbytes // size
        for start in range(0, size, BLOCK_BYTES // width):
            extent = (min(BLOCK_BYTES // width, size - start),)
            left, right = (reader.bytes_of(Region(name, start, (1,), extent, (0,))) for name in (one, other))
            if left != right:
                return False
    return True

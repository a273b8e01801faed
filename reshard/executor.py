"""Carry out a plan: fill each target tensor block by block from its regions, digest it while hot, write it once."""

from __future__ import annotations

import math
import mmap
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .digest import digest_file, new_digest, tree_digest
from .dtypes import itemsize, torch_name
from .errors import BadInputError, IntegrityError, StorageError, printable
from .layout import FileLayout, Slot
from .placement import Piece
from .regions import Box, Region, boxes, cut, is_run
from .source import Source
from .targets import LocalTensor

__all__ = [
    "BLOCK_BYTES",
    "Evidence",
    "SourceReader",
    "equal_tensors",
    "tensor_blocks",
    "worker_count",
    "write_files",
]

# The mapping is read-only and so are our views of it.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)

BLOCK_BYTES = 4 << 20
# Data is moved as integers of the same width: bits survive whatever they mean, and every dtype has a copy kernel.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was written: size in bytes, digest of the whole file, digest of each tensor."""

    name: str
    size: int
    digest: str
    tensors: dict[str, str]


def worker_count() -> int:
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


class SourceReader:
    """The source files, mapped. Mapped pages belong to the page cache: they are not this process's memory."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._maps: dict[str, mmap.mmap] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> SourceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._maps.clear()  # views may still be alive: each map closes with its last one

    def _map(self, name: str) -> mmap.mmap:
        with self._lock:
            if name not in self._maps:
                file = self._source.file(name)
                try:
                    with open(file.path, "rb") as opened:
                        if os.fstat(opened.fileno()).st_size != file.size:
                            raise IntegrityError(f"{printable(file.path)}: its size changed since it was opened")
                        self._maps[name] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
                except OSError as error:
                    raise BadInputError(f"{printable(file.path)}: cannot be read: {error.strerror}") from None
            return self._maps[name]

    def view(self, region: Region, *, bits: bool) -> torch.Tensor:
        """The region's elements as a strided view of the mapped file; as same-width integers where `bits`."""
        info = self._source.tensors[region.source]
        name = torch_name(info.dtype, tensor=info.name)
        width = itemsize(name)
        last = sum((size - 1) * stride for size, stride in zip(region.extent, region.strides))
        dtype = _BITS[width] if bits else getattr(torch, name)
        flat = torch.frombuffer(
            self._map(info.file), dtype=dtype, count=last + 1, offset=info.start + region.offset * width
        )
        return flat.as_strided(region.extent, region.strides)

    def bytes_of(self, region: Region) -> memoryview:
        """The bytes of a region that is one contiguous run."""
        info = self._source.tensors[region.source]
        width = itemsize(torch_name(info.dtype, tensor=info.name))
        start = info.start + region.offset * width
        return memoryview(self._map(info.file))[start : start + region.size * width]

    def dtype(self, region: Region) -> str:
        info = self._source.tensors[region.source]
        return torch_name(info.dtype, tensor=info.name)

    def unchanged(self) -> None:
        """Raises IntegrityError where a source file is not what it was when it was opened."""
        for file in self._source.files:
            status = os.stat(file.path)
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise IntegrityError(f"{printable(file.path)}: changed while it was being read")


def tensor_blocks(tensor: LocalTensor, reader: SourceReader, buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The bytes of a tensor in order: (offset in bytes, block). A block lives until the next one is asked for.

    Contiguous runs of the source come straight from its mapping; what must be gathered or cast uses `buffer`, so
    memory is `len(buffer)` whatever the tensor's size.
    """
    width = itemsize(tensor.dtype)
    for box in boxes(tensor.shape, len(buffer) // width):
        inside = cut(_near(tensor.regions, box), Piece(box.start, box.extent, (0,) * len(box.extent)))
        only = inside[0]
        if len(inside) == 1 and is_run(only) and reader.dtype(only) == tensor.dtype:
            yield box.offset * width, reader.bytes_of(only)
            continue
        block = buffer[: box.size * width]
        _gather(inside, box, tensor.dtype, reader, block)
        yield box.offset * width, block


def _near(regions: Sequence[Region], box: Box) -> Sequence[Region]:
    """The regions that the box's first dim can meet: fused experts have hundreds, and a block spans few."""
    if len(regions) == 1 or not box.start:
        return regions
    low, high = box.start[0], box.start[0] + box.extent[0]
    return [r for r in regions if r.target_start[0] < high and r.target_start[0] + r.extent[0] > low]


def _gather(regions: Sequence[Region], box: Box, dtype: str, reader: SourceReader, block: memoryview) -> None:
    bits = all(reader.dtype(region) == dtype for region in regions)
    kind = _BITS[itemsize(dtype)] if bits else getattr(torch, dtype)
    target = torch.frombuffer(block, dtype=kind).view(box.extent)
    for region in regions:
        index = tuple(slice(start, start + size) for start, size in zip(region.target_start, region.extent))
        target[index].copy_(reader.view(region, bits=bits))


def _pwrite(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def write_files(
    folder: Path,
    layouts: Sequence[FileLayout],
    source: Source,
    *,
    workers: int | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> tuple[list[Evidence], dict[str, str]]:
    """Write every file of a plan into `folder`; also digest the source files. `progress` is told of bytes written.

    Each worker thread takes whole tensors, in the order of the source files, then the digest of the file just read.
    Anonymous memory is at most `workers × BLOCK_BYTES`, whatever the size of the model or of a tensor. Every file is
    on disk (`fsync`) on return. Returns what was written, and the digests of the source files by name.

    Raises:
        StorageError: the disk refused.
        IntegrityError: a source file changed meanwhile.
    """
    files: list[int] = []
    digests: list[dict[str, str]] = [{} for _ in layouts]
    source_digests: dict[str, str] = {}
    scratch = _Scratch()

    def write(index: int, slot: Slot) -> None:
        digest = new_digest()
        for offset, block in tensor_blocks(slot.tensor, reader, scratch()):
            digest.update(block)
            _pwrite(files[index], block, slot.offset + offset)
            progress(len(block))
        digests[index][slot.tensor.name] = digest.hexdigest()

    def digest_source(name: str) -> None:
        source_digests[name] = digest_file(source.file(name).path)

    jobs: list[tuple[tuple[str, float], Callable[[], None]]] = [
        (_first_byte(slot.tensor, source), partial(write, index, slot))
        for index, layout in enumerate(layouts)
        for slot in layout.slots
    ]
    jobs += [((file.name, math.inf), partial(digest_source, file.name)) for file in source.files]
    jobs.sort(key=lambda job: job[0])
    with SourceReader(source) as reader:
        try:
            for layout in layouts:
                files.append(_create(folder / layout.name, layout))
            _run([work for _, work in jobs], workers or worker_count())
            reader.unchanged()
            for fd in files:
                os.fsync(fd)
        except OSError as error:
            raise StorageError(f"{printable(folder)}: {error.strerror}") from None
        finally:
            for fd in files:
                os.close(fd)
    return [_evidence(layout, found) for layout, found in zip(layouts, digests)], source_digests


def _evidence(layout: FileLayout, found: dict[str, str]) -> Evidence:
    tensors = {slot.tensor.name: found[slot.tensor.name] for slot in layout.slots}  # in file order, not as finished
    return Evidence(layout.name, layout.size, tree_digest(layout.head, tensors.values()), tensors)


class _Scratch(threading.local):
    """One block of memory per thread, made at its first use."""

    def __init__(self) -> None:
        self.block = memoryview(bytearray(BLOCK_BYTES))

    def __call__(self) -> memoryview:
        return self.block


def _create(path: Path, layout: FileLayout) -> int:
    """A new file of its full size, with its header in place."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o644)
        try:
            if layout.size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, layout.size)
            _pwrite(fd, memoryview(layout.head), 0)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise StorageError(f"{printable(path)}: {error.strerror}") from None
    return fd


def _first_byte(tensor: LocalTensor, source: Source) -> tuple[str, float]:
    """Where a tensor's data begins in the source: jobs in this order read each file once, from its beginning."""
    infos = (source.tensors[region.source] for region in tensor.regions)
    return min(((info.file, float(info.start)) for info in infos), default=("", 0.0))


def _run(jobs: Sequence[Callable[[], None]], workers: int) -> None:
    """Do every job on a pool; the first failure stops the rest."""
    stop = threading.Event()
    waiting = iter(jobs)
    lock = threading.Lock()

    def drain() -> None:
        while not stop.is_set():
            with lock:
                job = next(waiting, None)
            if job is None:
                return
            try:
                job()
            except BaseException:
                stop.set()
                raise

    workers = max(1, min(workers, len(jobs)))
    with ThreadPoolExecutor(workers, thread_name_prefix="reshard") as pool:
        try:
            for future in [pool.submit(drain) for _ in range(workers)]:
                future.result()
        except BaseException:  # an interrupt in this thread must stop the others too
            stop.set()
            raise


def equal_tensors(source: Source, one: str, other: str) -> bool:
    """Whether two source tensors hold the same bytes, read in blocks."""
    a, b = source.tensors[one], source.tensors[other]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if 0 in a.shape:
        return True
    with SourceReader(source) as reader:
        size = math.prod(a.shape)
        width = a.nbytes // size
        for start in range(0, size, BLOCK_BYTES // width):
            extent = (min(BLOCK_BYTES // width, size - start),)
            left, right = (reader.bytes_of(Region(name, start, (1,), extent, (0,))) for name in (one, other))
            if left != right:
                return False
    return True

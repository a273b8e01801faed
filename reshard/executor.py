"""Carry out a plan: fill each target tensor block by block from its regions, digest it while hot, write it once."""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from .digest import DigestsAhead, FileRecord, new_digest, tree_digest
from .errors import StorageError, printable
from .layout import FileLayout, Slot
from .process import worker_count
from .reader import BLOCK_BYTES, SourceReader, tensor_blocks
from .source import Source
from .targets import LocalTensor

__all__ = ["write_files"]


# For a larger write Linux takes page cache in pieces so large that finding them can cost more than the write: in a
# virtual machine, 2.3 s for 3 GB in writes of 4 MiB, and 0.8 s in these.
_WRITE_BYTES = 256 << 10


def _pwrite(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data[:_WRITE_BYTES], offset)
        data, offset = data[written:], offset + written


_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux has it
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, and do not wait
_WORTH_BEGINNING = 1 << 20  # bytes


def _begin_writeback(fd: int, offset: int, size: int) -> None:
    """Let the disk begin on what was just written, while the next block is made: less is left for fsync at the end.

    A hint: it promises nothing, so that nothing is lost where it fails or is not known.
    """
    if _sync_file_range is not None and size >= _WORTH_BEGINNING:
        _sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(size), _WRITE)


def write_files(
    folder: Path,
    layouts: Sequence[FileLayout],
    source: Source,
    *,
    ahead: DigestsAhead | None = None,
    workers: int | None = None,
    sync: bool = True,
    progress: Callable[[int], object] = lambda _: None,
) -> tuple[list[FileRecord], dict[str, str]]:
    """Write every file of a plan into `folder`; also digest the source files. `progress` is told of bytes written.

    Each worker thread takes whole tensors, in the order of the source files, then the digest of the file just read.
    Anonymous memory is at most `workers × BLOCK_BYTES`, whatever the size of the model or of a tensor. With
    `sync`, every file is on disk on return. Source files that `ahead` has begun are not digested again. Returns what
    was written, and the digests of the source files by name.

    Raises:
        StorageError: the disk refused.
        IntegrityError: a source file changed meanwhile.
    """
    files: list[int] = []
    digests: list[dict[str, str]] = [{} for _ in layouts]
    source_digests: dict[str, str] = {}
    if ahead:
        ahead.no_more()
    scratch = _Scratch()
    stop = threading.Event()

    def write(index: int, slot: Slot) -> None:
        digest = new_digest()
        for offset, block in tensor_blocks(slot.tensor, reader, scratch()):
            if stop.is_set():
                return
            digest.update(block)
            _pwrite(files[index], block, slot.offset + offset)
            if sync:
                _begin_writeback(files[index], slot.offset + offset, len(block))
            progress(len(block))
        digests[index][slot.tensor.name] = digest.hexdigest()

    def digest_source(name: str) -> None:
        known = ahead.get(name) if ahead else None
        if known is not None:
            source_digests[name] = known
            return
        digest = new_digest()
        for piece in reader.pieces_of_file(name):
            if stop.is_set():
                return
            digest.update(piece)
        source_digests[name] = digest.hexdigest()

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
            _run([work for _, work in jobs], workers or worker_count(), stop)
            reader.unchanged()
            for fd in files if sync else ():
                os.fsync(fd)
        except OSError as error:
            raise StorageError(f"{printable(folder)}: {error.strerror}") from None
        finally:
            for fd in files:
                os.close(fd)
    return [_evidence(layout, found) for layout, found in zip(layouts, digests)], source_digests


def _evidence(layout: FileLayout, found: dict[str, str]) -> FileRecord:
    tensors = {slot.tensor.name: found[slot.tensor.name] for slot in layout.slots}  # in file order, not as finished
    return FileRecord(layout.name, layout.size, tree_digest(layout.head, tensors.values()), tensors)


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


def _run(jobs: Sequence[Callable[[], None]], workers: int, stop: threading.Event) -> None:
    """Do every job on a pool; the first failure, or an interrupt, sets `stop` and ends the rest."""
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

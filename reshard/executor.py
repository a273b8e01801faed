"""Carry out a plan: fill each target tensor block by block from its regions, digest it while hot, write it once."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from .digest import DigestsAhead, FileRecord, new_digest, tree_digest
from .journal import Journal
from .layout import FileLayout, Slot
from .output import begin_writeback, create, digest_in, pwrite, write_error
from .process import worker_count
from .rank_file import check_digests
from .reader import BLOCK_BYTES, SourceReader, tensor_blocks
from .source import Source, SourceFile
from .targets import LocalTensor

__all__ = ["write_files"]


def write_files(
    folder: Path,
    layouts: Sequence[FileLayout],
    source: Source,
    *,
    ahead: DigestsAhead | None = None,
    records: Mapping[str, FileRecord] | None = None,
    journal: Journal | None = None,
    workers: int | None = None,
    sync: bool = True,
    progress: Callable[[int], object] = lambda _: None,
) -> tuple[list[FileRecord], dict[str, str]]:
    """Write every file of a plan into `folder`; also digest the source files. `progress` is told of bytes written.

    Each worker thread takes whole tensors, in the order of the source files, then the digest of the file just read.
    Anonymous memory is at most `workers × BLOCK_BYTES`, whatever the size of the model or of a tensor. With
    `sync`, every file is on disk on return. With a journal, what an earlier run wrote is kept where it still has the
    digest claimed there. Source files that `ahead` has begun are not digested again; of those with `records`, which
    are rank files themselves, every tensor is checked instead. Returns what was written, and the digests of the source
    files by name.

    Raises:
        StorageError: the disk refused.
        IntegrityError: a source file changed meanwhile, or is not as it was recorded.
    """
    files: list[int] = []
    digests: list[dict[str, str]] = [{} for _ in layouts]
    source_digests: dict[str, str] = {}
    if ahead:
        ahead.no_more()
    scratch = _Scratch()
    stop = threading.Event()
    written = False

    def write(index: int, slot: Slot) -> None:
        name, tensor = layouts[index].name, slot.tensor.name
        claim = journal.claimed.get((name, tensor)) if journal else None
        if claim is not None and digest_in(files[index], slot, scratch()) == claim:
            digests[index][tensor] = claim
            progress(slot.tensor.nbytes)
            return
        digest = new_digest()
        for offset, block in tensor_blocks(slot.tensor, reader, scratch()):
            if stop.is_set():
                return
            digest.update(block)
            pwrite(files[index], block, slot.offset + offset)
            if sync:
                begin_writeback(files[index], slot.offset + offset, len(block))
            progress(len(block))
        reader.check(slot.tensor)  # before the journal has it
        digests[index][tensor] = digest.hexdigest()
        if journal:
            journal.add(name, tensor, digest.hexdigest())

    def digest_range(name: str, start: int, end: int) -> str:
        digest = new_digest()
        for piece in reader.pieces_of_file(name, start, end):
            if stop.is_set():
                break
            digest.update(piece)
        return digest.hexdigest()

    def digest_source(file: SourceFile) -> None:
        if records is not None:
            found = {info.name: digest_range(file.name, info.start, info.end) for info in file.header.tensors}
            if not stop.is_set():
                check_digests(file.path, records[file.name], file.header, found)
            return
        known = ahead.get(file.name) if ahead else None
        source_digests[file.name] = known or digest_range(file.name, 0, file.size)

    jobs: list[tuple[tuple[str, float], Callable[[], None]]] = [
        (_first_byte(slot.tensor, source), partial(write, index, slot))
        for index, layout in enumerate(layouts)
        for slot in layout.slots
    ]
    jobs += [((file.name, math.inf), partial(digest_source, file)) for file in source.files]
    jobs.sort(key=lambda job: job[0])
    try:
        with contextlib.ExitStack() as opened:
            for layout in layouts:
                files.append(create(folder / layout.name, layout, anew=journal is None))
                opened.callback(os.close, files[-1])
            with SourceReader(source) as reader:
                _run([work for _, work in jobs], workers or worker_count(), stop)
            written = True
            for fd in files if sync else ():
                os.fsync(fd)
    except OSError as error:
        raise write_error(folder, error, synced=written) from None
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


def _first_byte(tensor: LocalTensor, source: Source) -> tuple[str, float]:
    """Where a tensor's data begins in the source: jobs in this order read each file once, from its beginning."""
    infos = (source.tensors[region.source] for region in tensor.regions)
    return min(((info.file, float(info.start)) for info in infos), default=("", 0.0))


def _run(jobs: Sequence[Callable[[], None]], workers: int, stop: threading.Event) -> None:
    """Do every job on a pool; the first failure, or an interrupt, sets `stop` and ends the rest.

    On return no thread is at work, whatever happened: the files that they write to can be closed. An interrupt can come
    while the pool is starting a thread, which the pool then does not know and would not wait for.
    """
    waiting = iter(jobs)
    lock = threading.Condition()
    at_work = 0

    def drain() -> None:
        nonlocal at_work
        with lock:
            if stop.is_set():
                return
            at_work += 1
        try:
            while not stop.is_set():
                with lock:
                    job = next(waiting, None)
                if job is None:
                    return
                job()
        except BaseException:
            stop.set()
            raise
        finally:
            with lock:
                at_work -= 1
                lock.notify_all()

    def wait_for_all() -> None:
        with lock:
            stop.set()  # a thread that has not begun will not
            lock.wait_for(lambda: not at_work)

    workers = max(1, min(workers, len(jobs)))
    with ThreadPoolExecutor(workers, thread_name_prefix="reshard") as pool:
        try:
            for future in [pool.submit(drain) for _ in range(workers)]:
                future.result()
        finally:
            while True:
                try:
                    wait_for_all()
                    break
                except BaseException:  # another interrupt: the first one is under way already
                    continue

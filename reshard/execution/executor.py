"""The executor of a plan: each target tensor is filled from its regions by blocks, digested while hot, written once."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..checkpoint.source import Source, SourceFile
from ..files.digest import DigestsAhead, new_digest, tree_digest
from ..process import BLOCK_BYTES, one_thread_each, worker_count
from ..resharded.derived import Computed, read_regions
from ..resharded.layout import FileLayout, Slot
from ..resharded.rank_file import FileRecord, check_digests
from ..resharded.targets import LocalTensor
from ..storage.disk import pwrite, write_error
from ..storage.outputs import OutputFiles, begin_writeback, digest_in
from ..storage.prefetch import Arrivals, in_order
from .earlier import Earlier
from .jobs import Job, run_jobs
from .journal import Journal
from .reader import SourceReader, tensor_blocks

__all__ = ["Inputs", "reads_of", "write_files"]

_SOURCE = ""  # stands in the journal for the name of an output file: no file has this name


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a conversion: the `source` files, and what is known of them.

    Files that `ahead` has begun are not digested again. Files still to come are taken from `arrivals`, each for as long
    as it is needed; a file of which nothing is missing is not asked for. If there are `records`, the source files are
    rank files themselves: every tensor is checked against its record, and no digest of a file is made. Tensors that are
    `computed` are in none of the files: they are computed from those that are, a block at a time. Only the `digested`
    files are digested, or checked, whole: all of them if that is None. Tensors that are the same in an `earlier` folder
    share its blocks, where the file system can do that.
    """

    source: Source
    ahead: DigestsAhead | None = None
    arrivals: Arrivals | None = None
    records: Mapping[str, FileRecord] | None = None
    computed: Mapping[str, Computed] = field(default_factory=dict)
    digested: Collection[str] | None = None
    earlier: Earlier | None = None


def write_files(
    folder: Path,
    layouts: Sequence[FileLayout],
    inputs: Inputs,
    *,
    journal: Journal | None = None,
    workers: int | None = None,
    sync: bool = True,
    progress: Callable[[int], object] = lambda _: None,
) -> tuple[list[FileRecord], dict[str, str]]:
    """Write files of a plan into `folder`; also digest the source files. `progress` is told of bytes written.

    Each worker thread takes whole tensors, in the order of the source files, then the digest of the file just read.
    Anonymous memory is at most `workers × BLOCK_BYTES`, whatever the size of the model or of a tensor; a computed block
    takes a few times as much. With `sync`, every file is on disk on return. With a journal, a tensor that an earlier
    run wrote is kept if it still has the digest claimed there. Returns the record of each file, and the digests of the
    source files by name.

    Raises:
        StorageError: the disk refused.
        IntegrityError: a source file changed meanwhile, or is not as it was recorded.
    """
    source, ahead, arrivals, records = inputs.source, inputs.ahead, inputs.arrivals, inputs.records
    earlier = inputs.earlier
    digests: list[dict[str, str]] = [{} for _ in layouts]
    source_digests: dict[str, str] = {}
    if ahead:
        ahead.no_more()
    scratch = _Scratch()
    stop = threading.Event()
    written = False
    claimed = journal.claimed if journal else {}

    def write(index: int, slot: Slot) -> None:
        name, tensor = layouts[index].name, slot.tensor.name
        claim = claimed.get((name, tensor))
        with files.opened(index) as fd:
            if claim is not None and digest_in(fd, slot, scratch()) == claim:
                digests[index][tensor] = claim
                progress(slot.tensor.nbytes)
                return
            found = taken_over(fd, name, slot)
            if found is None:
                digest = new_digest()
                for offset, block in tensor_blocks(slot.tensor, reader, scratch()):
                    if stop.is_set():
                        return
                    digest.update(block)
                    pwrite(fd, block, slot.offset + offset)
                    if sync:
                        begin_writeback(fd, slot.offset + offset, len(block))
                    progress(len(block))
                found = digest.hexdigest()
        reader.check(slot.tensor)  # before the journal claims it
        digests[index][tensor] = found
        if journal:
            journal.add(name, tensor, found)

    def taken_over(fd: int, name: str, slot: Slot) -> str | None:
        """Take a tensor that is the same in the earlier folder, and return its digest. None if it is not there."""
        if earlier is None or (there := earlier.find(name, slot.tensor.name, slot.tensor.nbytes)) is None:
            return None
        digest = new_digest()
        for offset, block in tensor_blocks(slot.tensor, reader, scratch()):
            if stop.is_set() or (not offset and not there.begins_as(block)):
                return None  # most tensors that differ do from the beginning: these are read once
            digest.update(block)
        if digest.hexdigest() != there.digest:
            return None
        if not earlier.take(there, fd, slot.offset) or digest_in(fd, slot, scratch()) != there.digest:
            return None
        earlier.count(slot.tensor.nbytes)
        progress(slot.tensor.nbytes)
        return there.digest

    def digest_range(name: str, start: int, end: int) -> str:
        digest = new_digest()
        for piece in reader.pieces_of_file(name, start, end):
            if stop.is_set():
                break
            digest.update(piece)
        return digest.hexdigest()

    def digest_source(file: SourceFile) -> None:
        if records is not None:  # also if they come a second time, from a store that knows no digests
            found = {info.name: digest_range(file.name, info.start, info.end) for info in file.header.tensors}
            if not stop.is_set():
                check_digests(file.path, records[file.name], file.header, found)
            return
        # A file that arrives has no other digest than this one, so a claim holds.
        known = claimed.get((_SOURCE, file.name)) if arrivals else ahead.get(file.name) if ahead else None
        source_digests[file.name] = known or digest_range(file.name, 0, file.size)
        if arrivals and journal and not known and not stop.is_set():
            journal.add(_SOURCE, file.name, source_digests[file.name])

    jobs = [
        Job(*reads_of(slot.tensor, inputs), partial(write, index, slot), (layout.name, slot.tensor.name) in claimed)
        for index, layout in enumerate(layouts)
        for slot in layout.slots
    ]
    jobs += [
        Job((file.name,), math.inf, partial(digest_source, file), (_SOURCE, file.name) in claimed)
        for file in source.files
        if inputs.digested is None or file.name in inputs.digested
    ]
    # Each file that is here is read once, from its beginning. Files to come are waited for no longer than must be.
    jobs.sort(key=lambda job: (job.files[-1 if arrivals else 0] if job.files else "", job.at))
    if arrivals:
        arrivals.expect(in_order(job.files for job in jobs if job.files and not job.done))
    try:
        with OutputFiles(folder, layouts, anew=journal is None) as files:
            with (
                SourceReader(source, arrivals, stop.is_set, computed=inputs.computed) as reader,
                one_thread_each() if inputs.computed else contextlib.nullcontext(),
            ):
                run_jobs(jobs, min(workers or worker_count(), files.most), stop, release=reader.release)
            written = True
            if sync:
                files.sync()
    except OSError as error:
        raise write_error(folder, error, synced=written) from None
    return [_evidence(layout, found) for layout, found in zip(layouts, digests)], source_digests


def _evidence(layout: FileLayout, found: dict[str, str]) -> FileRecord:
    tensors = {slot.tensor.name: found[slot.tensor.name] for slot in layout.slots}  # in file order, not as finished
    return FileRecord(layout.name, layout.size, tree_digest(layout.head, tensors.values()), tensors)


def reads_of(tensor: LocalTensor, inputs: Inputs) -> tuple[tuple[str, ...], float]:
    """Return the source files that a tensor is made of, in order, and the byte where it begins in the first."""
    infos = [inputs.source.tensors[region.source] for region in read_regions(tensor.regions, inputs.computed)]
    files = tuple(sorted({info.file for info in infos}))
    return files, float(min((info.start for info in infos if info.file == files[0]), default=0))


class _Scratch(threading.local):
    """One block of memory per thread, made at its first use."""

    def __init__(self) -> None:
        self.block = memoryview(bytearray(BLOCK_BYTES))

    def __call__(self) -> memoryview:
        return self.block

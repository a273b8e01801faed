"""The comparison of a resharded folder with its source, element by element, as the manifest describes the cut."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...checkpoint.source import Source, model_config
from ...checkpoint.weights import AS_FOUND, Choice
from ...engines.constants import CONSTANTS_NAME, as_read
from ...errors import BadInputError, IntegrityError
from ...execution.origin import Origin
from ...execution.reader import SourceReader, equal_tensors, tensor_blocks
from ...files.header import Header, TensorInfo, read_header
from ...files.mapped import MappedFile
from ...process import BLOCK_BYTES, Advance, Progress, silent
from ...resharded.as_source import source_headers, source_tensors
from ...resharded.manifest import Manifest
from ...resharded.rank_file import FileRecord
from ...resharded.targets import LocalTensor, unused_tensors
from ...storage.locate import resolve_source
from ...text import printable
from ..values.change import made_again

__all__ = ["compare_with_source"]


def compare_with_source(
    folder: Path,
    manifest: Manifest,
    place: str,
    ranks: range,
    *,
    revision: str | None = None,
    choice: Choice = AS_FOUND,
    progress: Progress = silent,
) -> int:
    """Gather each tensor of the files of these `ranks` from the source again and compare the bytes; with rank 0, also
    those of the other files. Returns how many elements agree. What was quantized or dequantised is computed again.

    Every element of every source tensor must be in some parameter, in the unused file, or dropped on purpose. (For
    another engine's rank files, the export made sure of that.)
    Peak memory is one block (`BLOCK_BYTES`).
    """
    source = resolve_source(place, revision=revision, choice=choice, progress=progress)
    headers = source_headers(manifest)
    origin = (
        made_again(manifest, model_config(folder), source, progress=progress) if manifest.derived else Origin(source)
    )
    source = origin.source
    _check_is_source(folder, manifest, headers, source)
    if manifest.engine:
        if CONSTANTS_NAME not in {extra.name for extra in manifest.extras}:
            raise IntegrityError(f"{printable(folder)}: lists no {CONSTANTS_NAME}")
        source = as_read(source, folder / CONSTANTS_NAME, manifest.engine["taken_for"])
        _check_inside(manifest, source)
    else:
        source_tensors(manifest, headers)  # raises if an element is nowhere
    there = source if manifest.engine else origin.original
    held: list[tuple[FileRecord, Iterable[LocalTensor]]] = [
        (manifest.rank_files[rank], manifest.tensors_of(rank)) for rank in ranks
    ]
    if 0 in ranks:
        _check_duplicates(manifest, there)
    if 0 in ranks and manifest.unused_file:
        held.append((manifest.unused_file, unused_tensors(source, manifest.unused_file.tensors)))
    total = sum(record.size for record, _ in held)
    computed = origin.derived.computed if origin.derived else {}
    with SourceReader(there, computed=computed) as reader, progress(total, "comparing") as report:
        return sum(_compare(folder, record, tensors, reader, report) for record, tensors in held)


def _check_is_source(folder: Path, manifest: Manifest, headers: Mapping[str, Header], source: Source) -> None:
    """Check that the source has the recorded tensors: regions are offsets, which mean nothing in other shapes."""
    recorded = {info.name: info for header in headers.values() for info in header.tensors}
    for name in sorted(recorded.keys() | source.tensors.keys()):
        was, now = (_described(found.get(name)) for found in (recorded, source.tensors))
        if was != now:
            made_of = f"{printable(manifest.repo_id)} at {printable(manifest.commit)}" if manifest.repo_id else None
            raise BadInputError(
                f"{printable(source.root)}: is not what {printable(folder)} was made from:"
                f" {printable(name)} is {now} here, and was {was} there",
                hint=f"it was made from {made_of}" if made_of else "give the checkpoint it was made from",
            )


def _check_inside(manifest: Manifest, source: Source) -> None:
    """Check that the regions of an engine's rank files lie inside their sources."""
    for parameter in manifest.parameters:
        for region in parameter.regions:
            info = source.tensors.get(region.source)
            last = region.offset + sum((size - 1) * stride for size, stride in zip(region.extent, region.strides))
            if info is None or last >= math.prod(info.shape):
                raise IntegrityError(
                    f"{printable(parameter.name)}: is made of {printable(region.source)}, which has no such elements"
                )


def _described(info: TensorInfo | None) -> str:
    return "absent" if info is None else f"{info.dtype} of shape {list(info.shape)}"


def _check_duplicates(manifest: Manifest, source: Source) -> None:
    for name, owner in manifest.duplicates.items():
        if not equal_tensors(source, name, owner):
            raise IntegrityError(f"{printable(name)}: differs from {printable(owner)}, which is stored in its place")


def _compare(
    folder: Path, record: FileRecord, tensors: Iterable[LocalTensor], reader: SourceReader, report: Advance
) -> int:
    path, buffer, compared = folder / record.name, memoryview(bytearray(BLOCK_BYTES)), 0
    with MappedFile(path, size=record.size) as mapped:
        stored = {info.name: info for info in read_header(path, file=record.name).tensors}
        for tensor in tensors:
            info = stored.get(tensor.name)
            if info is None or info.shape != tensor.shape:
                raise IntegrityError(
                    f"{printable(path)}: tensor {printable(tensor.name)} is missing or of another shape"
                )
            view = mapped.data[info.start : info.end]
            for offset, block in tensor_blocks(tensor, reader, buffer):
                if view[offset : offset + len(block)] != block:
                    raise IntegrityError(f"{printable(path)}: tensor {printable(tensor.name)} differs from the source")
                report(len(block))
            compared += math.prod(tensor.shape)
    return compared

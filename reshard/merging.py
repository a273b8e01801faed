"""The source files again, byte for byte, from the rank files: the plan read the other way, by the same executor."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .digest import ALGORITHM, FileRecord, digest_file
from .dtypes import torch_name
from .errors import BadInputError, IntegrityError, printable
from .executor import write_files
from .header import Header, TensorInfo, parse_header, read_header
from .inverse import invert, refined_shape
from .journal import Journal
from .layout import FileLayout, Slot
from .manifest import Manifest, read_manifest
from .progress import Progress, silent
from .regions import Region, covers, whole
from .source import INDEX_NAME, MANIFEST_NAME, Source, SourceFile, check_plain_name, vetted_path
from .staging import check_free_space, copy_file, staged_folder, write_file
from .targets import LocalTensor, rank_tensors

__all__ = ["merge"]

Held = dict[str, tuple[str, tuple[int, ...]]]  # tensor → dtype and shape


def merge(
    out: str | Path,
    dest: str | Path,
    *,
    workers: int | None = None,
    sync: bool = True,
    progress: Progress = silent,
) -> tuple[str, ...]:
    """Write the files that the resharded folder `out` was made from into the folder `dest`: the same bytes.

    Every file is digested in the end, and must be the one that was recorded. The small files are copied; an index is
    written anew. `dest` appears in one step, and an interrupted merge goes on, as with `convert`. Returns the names of
    the source files.

    Raises:
        BadInputError: what was done cannot be undone: tensors were cast, or dropped.
        IntegrityError: the folder is not whole, or what comes out is not what went in.
    """
    folder = Path(out)
    manifest = read_manifest(folder)
    headers = _headers(manifest)
    _check_undoable(manifest, headers)
    held = _rank_files(folder, manifest, headers)
    layouts = _layouts(manifest, headers)
    total = sum(layout.size for layout in layouts)
    with staged_folder(Path(dest), sync=sync) as stage:
        part = stage.begin(digest_file(folder / MANIFEST_NAME))
        check_free_space(part, total)
        with progress(total) as report, contextlib.closing(Journal(part)) as journal:
            write_files(part, layouts, held, journal=journal, workers=workers, sync=sync, progress=report)
        for file in manifest.source_files:
            if f"{ALGORITHM}:{digest_file(part / file['file'])}" != file["digest"]:
                raise IntegrityError(
                    f"{printable(folder)}: {printable(file['file'])} does not come out as it went in",
                    hint="reshard verify says which file was altered",
                )
        for extra in manifest.extras:
            copy_file(vetted_path(folder, extra.name, what="merge"), part / extra.name, sync=sync)
        if len(headers) > 1:
            write_file(part / INDEX_NAME, _index(headers), sync=sync)
    return tuple(headers)


def _headers(manifest: Manifest) -> dict[str, Header]:
    """The source files' headers by name, as the manifest has them: data that nobody vouches for."""
    taken = {MANIFEST_NAME, INDEX_NAME, *(extra.name for extra in manifest.extras)}
    headers: dict[str, Header] = {}
    for file in manifest.source_files:
        name = file["file"]
        check_plain_name(name, what=MANIFEST_NAME)
        if not name.endswith(".safetensors"):
            raise BadInputError(f"{MANIFEST_NAME}: {printable(name)} is not the name of a safetensors file")
        if name in taken:
            raise BadInputError(f"{MANIFEST_NAME}: {printable(name)} occurs twice")
        taken.add(name)
        headers[name] = parse_header(file["header"].encode(errors="surrogatepass"), file=name, file_size=file["size"])
    names = Counter(info.name for header in headers.values() for info in header.tensors)
    if names and names.most_common(1)[0][1] > 1:
        raise BadInputError(f"{MANIFEST_NAME}: {printable(names.most_common(1)[0][0])} is in two source files")
    unused = manifest.unused_file.tensors if manifest.unused_file else {}
    taken_from = {region.source for parameter in manifest.parameters for region in parameter.regions}
    unknown = sorted({*taken_from, *unused, *manifest.duplicates, *manifest.duplicates.values()} - names.keys())
    if unknown:
        raise BadInputError(f"{MANIFEST_NAME}: no source file holds {_some(unknown)}")
    return headers


def _check_undoable(manifest: Manifest, headers: Mapping[str, Header]) -> None:
    if manifest.dropped:
        raise BadInputError(f"{len(manifest.dropped)} tensors of the source were dropped: {_some(manifest.dropped)}")
    stored = {info.name: torch_name(info.dtype, tensor=info.name) for h in headers.values() for info in h.tensors}
    cast = [
        parameter.name
        for parameter in manifest.parameters
        if any(stored[region.source] != parameter.dtype for region in parameter.regions)
    ]
    if cast:
        raise BadInputError(f"{len(cast)} parameters were cast to another dtype, which loses bits: {_some(cast)}")


def _some(names: Any) -> str:
    return ", ".join(map(printable, names[:3])) + (" …" if len(names) > 3 else "")


def _rank_files(folder: Path, manifest: Manifest, headers: Mapping[str, Header]) -> Source:
    """The rank files, and the unused one, as a source. A tensor is named after its file too: every rank has each."""
    files: list[SourceFile] = []
    tensors: dict[str, TensorInfo] = {}
    for record, expected in _expected(manifest, headers):
        path = vetted_path(folder, record.name, what="merge")
        status = os.stat(path)
        if status.st_size != record.size:
            raise IntegrityError(f"{printable(path)}: expected {record.size} bytes, got {status.st_size}")
        header = read_header(path, file=record.name)
        _check_held(path, header, expected)
        files.append(SourceFile(record.name, path, status.st_size, status.st_mtime_ns, header))
        tensors |= {_held(record.name, info.name): info for info in header.tensors}
    return Source(folder, tuple(files), tensors, {}, ())


def _expected(manifest: Manifest, headers: Mapping[str, Header]) -> Iterator[tuple[FileRecord, Held]]:
    """Each file, and the dtype and shape of every tensor that it must hold."""
    for rank, record in enumerate(manifest.rank_files):
        tensors = rank_tensors(manifest.parameters, rank=rank, world_size=manifest.world_size)
        yield record, {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    if manifest.unused_file:
        wanted = {info.name: info for header in headers.values() for info in header.tensors}
        unused = [wanted[name] for name in manifest.unused_file.tensors]
        yield manifest.unused_file, {i.name: (torch_name(i.dtype, tensor=i.name), i.shape) for i in unused}


def _check_held(path: Path, header: Header, expected: Held) -> None:
    """Regions are offsets, which mean nothing in tensors of other shapes."""
    found = {info.name: (torch_name(info.dtype, tensor=info.name), info.shape) for info in header.tensors}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise IntegrityError(f"{printable(path)}: is missing, or of another shape: {_some(wrong)}")


def _held(file: str, tensor: str) -> str:
    return f"{file}/{tensor}"


def _layouts(manifest: Manifest, headers: Mapping[str, Header]) -> list[FileLayout]:
    filled = _filled(manifest, {info.name: info for header in headers.values() for info in header.tensors})
    layouts = []
    for name, header in headers.items():
        slots = tuple(Slot(filled[info.name], info.start) for info in header.tensors)
        size = max((info.end for info in header.tensors), default=header.data_start)
        layouts.append(FileLayout(name, header.head, slots, size))
    return layouts


def _filled(manifest: Manifest, wanted: Mapping[str, TensorInfo]) -> dict[str, LocalTensor]:
    """Every source tensor, and the regions of the rank files' tensors that fill it, each element once."""
    taken: dict[str, list[Region]] = defaultdict(list)
    for parameter in manifest.parameters:
        for region in parameter.regions:
            taken[region.source].append(region)
    shapes = {name: refined_shape(info.shape, taken[name]) for name, info in wanted.items()}
    found: dict[str, dict[Any, Region]] = defaultdict(dict)
    for rank, record in enumerate(manifest.rank_files):
        for tensor in rank_tensors(manifest.parameters, rank=rank, world_size=manifest.world_size):
            for region in tensor.regions:
                for back in invert(region, _held(record.name, tensor.name), tensor.shape, shapes[region.source]):
                    found[region.source].setdefault((back.target_start, back.extent), back)  # replicas: once
    if manifest.unused_file:
        for name in manifest.unused_file.tensors:
            shapes[name] = wanted[name].shape
            there = whole(_held(manifest.unused_file.name, name), wanted[name].shape)
            found[name] = dict(enumerate(there))
    tensors = {}
    for name, info in wanted.items():
        owner = manifest.duplicates.get(name, name)
        regions, shape = tuple(found[owner].values()), shapes[owner]
        if not covers(regions, shape):
            raise IntegrityError(f"{printable(name)}: not every element of it is in the folder")
        dtype = torch_name(info.dtype, tensor=name)
        tensors[name] = LocalTensor(name, shape, dtype, (0,) * len(shape), regions)
    return tensors


def _index(headers: Mapping[str, Header]) -> bytes:
    """`model.safetensors.index.json`, as transformers' save_pretrained writes it."""
    places = {info.name: name for name, header in headers.items() for info in header.tensors}
    total = sum(info.nbytes for header in headers.values() for info in header.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()

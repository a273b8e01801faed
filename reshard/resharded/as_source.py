"""A resharded folder as a source: the tensors of the checkpoint it was made from, as regions of the rank files."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..checkpoint.source import MANIFEST_NAME, Source, SourceFile, model_config
from ..checkpoint.weights import INDEX_NAME
from ..errors import BadInputError, IntegrityError
from ..files.digest import digest_file
from ..files.dtypes import holds, torch_name
from ..files.header import Header, TensorInfo, parse_header
from ..files.untrusted import check_plain_name, check_plain_path
from ..sharding.inverse import invert, once, refined_shape, through
from ..sharding.regions import Region, covers, whole
from ..text import listed, printable
from .layout import FileLayout
from .manifest import Manifest, read_manifest, refuse_engine
from .rank_file import FileRecord, read_rank_header, written_file
from .targets import LocalTensor

__all__ = [
    "UNKNOWN",
    "Resharded",
    "open_resharded",
    "recorded",
    "source_headers",
    "source_tensors",
    "written_back",
]

UNKNOWN = ""  # stands for a digest in a manifest that is not complete

Held = dict[str, tuple[str, tuple[int, ...]]]  # tensor → dtype and shape


@dataclass(frozen=True, slots=True)
class Resharded:
    """A resharded folder, to be read as a source.

    `source` is the checkpoint that it was made from: its headers, and paths of files that are not there any more.
    `held` are the rank files and the file of unused tensors. A tensor's name in it begins with the file's name, since
    every rank file has the same tensors. `tensors` are the tensors of the source that were not dropped; regions of
    `held` fill each. Each has its dtype in the source, or the dtype that it was cast to if the cast lost bits.
    """

    manifest: Manifest
    source: Source
    held: Source
    tensors: dict[str, LocalTensor]

    @property
    def records(self) -> dict[str, FileRecord]:
        """The record of every file that the manifest lists, by name."""
        return {record.name: record for record in self.manifest.files()}

    def equal(self, one: str, other: str) -> bool:
        """Whether two source tensors were found to hold the same bytes when the folder was made."""
        owners = self.manifest.duplicates
        return owners.get(one, one) == owners.get(other, other)

    def relocated(self, layout: FileLayout, *, computed: Container[str] = ()) -> FileLayout:
        """Return a file planned from the source, to be filled from the rank files instead. What is `computed` stays.

        Raises:
            BadInputError: a tensor that it needs was dropped, or was cast to a third dtype.
        """
        slots = (replace(slot, tensor=self.relocated_tensor(slot.tensor, computed=computed)) for slot in layout.slots)
        return replace(layout, slots=tuple(slots))

    def relocated_tensor(self, tensor: LocalTensor, *, computed: Container[str] = ()) -> LocalTensor:
        """Return a tensor of such a file. Raises what `relocated` does."""
        found: list[Region] = []
        for region in tensor.regions:
            if region.source in computed:
                found.append(region)
                continue
            there = self.tensors.get(region.source)
            if there is None:
                raise BadInputError(
                    f"{printable(self.held.root)}: {printable(region.source)} was dropped when it was made",
                    hint="start from its source, or drop it again with --drop-unused",
                )
            stored = torch_name(self.source.tensors[region.source].dtype, tensor=region.source)
            if there.dtype not in (stored, tensor.dtype):
                raise BadInputError(
                    f"{printable(self.held.root)}: {printable(region.source)} was cast from {stored} to {there.dtype}"
                    " when it was made, which loses bits",
                    hint=f"start from its source, or give --dtype {there.dtype} again",
                )
            found += through(region, tensor.shape, there.regions, there.shape)
        return replace(tensor, regions=tuple(found))


def _none_absent(_: Sequence[FileRecord]) -> Mapping[str, Header]:
    return {}


def open_resharded(
    folder: Path, *, absent: Callable[[Sequence[FileRecord]], Mapping[str, Header]] = _none_absent
) -> Resharded:
    """Read the manifest and headers of a resharded folder, and check the bytes of its small files.

    `absent` gives the headers of the rank files that are elsewhere instead of in the folder.

    Raises:
        BadInputError: it is not a resharded folder, or its manifest makes no sense.
        IntegrityError: files are missing, or are not those that were written.
        NetworkError: `absent` has no answer.
        VersionError: a newer release made it.
    """
    manifest = read_manifest(folder)
    refuse_engine(folder, manifest)
    headers = source_headers(manifest)
    for extra in manifest.extras:
        path = written_file(folder, extra)
        if digest_file(path) != extra.digest:
            raise IntegrityError(f"{printable(path)}: its content was altered")
    return _resharded(folder, manifest, headers, model_config(folder), absent)


def written_back(folder: Path, manifest: Manifest) -> Resharded:
    """Return rank files that have just been written into `folder`, as a source, by the manifest that they will have."""
    return _resharded(folder, manifest, source_headers(manifest), {}, _none_absent)


def _resharded(
    folder: Path,
    manifest: Manifest,
    headers: Mapping[str, Header],
    config: dict[str, Any],
    absent: Callable[[Sequence[FileRecord]], Mapping[str, Header]],
) -> Resharded:
    sizes = {file["file"]: file["size"] for file in manifest.source_files}
    source = Source(
        folder,
        tuple(SourceFile(name, folder / name, sizes[name], 0, header) for name, header in headers.items()),
        _by_name(headers),
        config,
        tuple(extra.name for extra in manifest.extras),
        manifest.repo_id,
        manifest.commit,
    )
    held = _rank_files(folder, absent, manifest, headers)
    return Resharded(manifest, source, held, source_tensors(manifest, headers))


def recorded(file: SourceFile, digest: str) -> dict[str, Any]:
    """Return a source file as a manifest has it. Its digest is `UNKNOWN` until it is read."""
    return {"file": file.name, "size": file.size, "digest": digest, "header": file.header.raw.decode()}


def source_headers(manifest: Manifest) -> dict[str, Header]:
    """Return the source files' headers by path, as the manifest has them: untrusted data, checked here.

    A tensor may be in two files if its dtype and shape are the same in both.
    """
    taken = {MANIFEST_NAME, INDEX_NAME, *(extra.name for extra in manifest.extras)}
    headers: dict[str, Header] = {}
    for file in manifest.source_files:
        name = file["file"]
        check_plain_path(name, what=MANIFEST_NAME)
        if not name.endswith(".safetensors"):
            raise BadInputError(f"{MANIFEST_NAME}: {printable(name)} is not the name of a safetensors file")
        if name in taken:
            raise BadInputError(f"{MANIFEST_NAME}: {printable(name)} occurs twice")
        taken.add(name)
        headers[name] = parse_header(file["header"].encode(errors="surrogatepass"), file=name, file_size=file["size"])
    for name in sorted(headers):
        if any(str(folder) in taken for folder in PurePosixPath(name).parents):
            raise BadInputError(f"{MANIFEST_NAME}: {printable(name)} is in a folder that is a file")
    names = _by_name(headers)
    for header in headers.values():
        for info in header.tensors:
            same = names[info.name]
            if (info.dtype, info.shape) != (same.dtype, same.shape):
                raise BadInputError(f"{MANIFEST_NAME}: {printable(info.name)} is in two source files, and differs")
    unused = manifest.unused_file.tensors if manifest.unused_file else {}
    taken_from = {region.source for parameter in manifest.parameters for region in parameter.regions}
    known = taken_from if manifest.engine else names.keys()  # an engine's rank files have constants of their own too
    unknown = sorted({*taken_from, *unused, *manifest.duplicates, *manifest.duplicates.values()} - known)
    if unknown:
        raise BadInputError(f"{MANIFEST_NAME}: no source file holds {listed(unknown)}")
    return headers


def _by_name(headers: Mapping[str, Header]) -> dict[str, TensorInfo]:
    return {info.name: info for header in headers.values() for info in header.tensors}


def _rank_files(
    folder: Path,
    absent: Callable[[Sequence[FileRecord]], Mapping[str, Header]],
    manifest: Manifest,
    headers: Mapping[str, Header],
) -> Source:
    expected = list(_expected(manifest, headers))
    elsewhere = absent([record for record, _ in expected])
    files: list[SourceFile] = []
    tensors: dict[str, TensorInfo] = {}
    for record, held in expected:
        check_plain_name(record.name, what=MANIFEST_NAME)
        path, header, mtime_ns = folder / record.name, elsewhere.get(record.name), 0
        if header is None:
            mtime_ns = os.stat(written_file(folder, record)).st_mtime_ns
            header = read_rank_header(path, record)
        _check_held(path, header, held)
        files.append(SourceFile(record.name, path, record.size, mtime_ns, header))
        tensors |= {_held(record.name, info.name): info for info in header.tensors}
    return Source(folder, tuple(files), tensors, {}, ())


def _expected(manifest: Manifest, headers: Mapping[str, Header]) -> Iterator[tuple[FileRecord, Held]]:
    """Yield each file with the dtype and shape of every tensor that it must hold."""
    for rank, record in enumerate(manifest.rank_files):
        yield record, {tensor.name: (tensor.dtype, tensor.shape) for tensor in manifest.tensors_of(rank)}
    if manifest.unused_file:
        wanted = _by_name(headers)
        unused = [wanted[name] for name in manifest.unused_file.tensors]
        yield manifest.unused_file, {i.name: (torch_name(i.dtype, tensor=i.name), i.shape) for i in unused}


def _check_held(path: Path, header: Header, expected: Held) -> None:
    """Check dtypes and shapes: regions are offsets, which mean nothing in tensors of other shapes."""
    found = {info.name: (torch_name(info.dtype, tensor=info.name), info.shape) for info in header.tensors}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise IntegrityError(f"{printable(path)}: is missing, or of another shape: {listed(wrong)}")


def _held(file: str, tensor: str) -> str:
    return f"{file}/{tensor}"


def source_tensors(manifest: Manifest, headers: Mapping[str, Header]) -> dict[str, LocalTensor]:
    """Return every source tensor that was not dropped, filled from the rank files: each element once.

    Shapes are refined ones (see `refined_shape`). Raises IntegrityError if an element is in no file.
    """
    wanted = _by_name(headers)
    taken: dict[str, list[Region]] = defaultdict(list)
    for parameter in manifest.parameters:
        for region in parameter.regions:
            taken[region.source].append(region)
    shapes = {name: refined_shape(info.shape, taken[name]) for name, info in wanted.items()}
    found: dict[str, dict[str, list[Region]]] = defaultdict(lambda: defaultdict(list))  # by name and dtype
    for rank, record in enumerate(manifest.rank_files):
        for tensor in manifest.tensors_of(rank):
            held = _held(record.name, tensor.name)
            for region in tensor.regions:
                found[region.source][tensor.dtype] += invert(region, held, tensor.shape, shapes[region.source])
    if manifest.unused_file:
        for name in manifest.unused_file.tensors:
            shapes[name] = wanted[name].shape
            there = whole(_held(manifest.unused_file.name, name), wanted[name].shape)
            found[name] = {torch_name(wanted[name].dtype, tensor=name): list(there)}
    kept = [name for name in wanted if name not in manifest.dropped]
    return {name: _filled(name, manifest.duplicates.get(name, name), wanted, found, shapes) for name in kept}


def _filled(
    name: str,
    owner: str,
    wanted: Mapping[str, TensorInfo],
    found: Mapping[str, Mapping[str, list[Region]]],
    shapes: Mapping[str, tuple[int, ...]],
) -> LocalTensor:
    """Fill a source tensor from the regions of its owner: itself, or an equal tensor that is kept for both.

    Regions in the source's dtype are preferred to cast ones. A tensor that was cast to a dtype that holds all its
    values is given back in its own dtype, as no bit was lost.
    """
    shape, stored = shapes[owner], torch_name(wanted[name].dtype, tensor=name)
    for dtype in dict.fromkeys((stored, *found[owner])):
        regions = once(found[owner].get(dtype, ()), shape)
        if covers(regions, shape):
            given = stored if holds(dtype, stored) else dtype
            return LocalTensor(name, shape, given, (0,) * len(shape), regions)
    raise IntegrityError(f"{printable(name)}: not every element of it is in the folder")

"""The way back from rank files to the source files, byte for byte: the same executor, with the plan in reverse."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..checkpoint.source import MANIFEST_NAME
from ..checkpoint.weights import INDEX_NAME, INDEX_SUFFIX, SINGLE_NAME, weights_named_by
from ..errors import BadInputError, IntegrityError, PolicyError, UsageError
from ..execution.destination import destination
from ..execution.executor import Inputs, write_files
from ..execution.journal import Journal
from ..execution.staging import staged_folder
from ..files.digest import ALGORITHM, digest_file, digest_of
from ..files.dtypes import torch_name
from ..process import Advance, Progress, silent
from ..resharded.as_source import Resharded, open_resharded
from ..resharded.layout import FileLayout, Slot, file_layout
from ..resharded.manifest import REFERENCE_NAME
from ..resharded.rank_file import written_file
from ..storage.disk import check_free_space, copy_file, make_folders, write_file
from ..storage.locate import fetch
from ..storage.stores import as_text
from ..text import listed, printable
from .arguments import checked

__all__ = ["LAYOUTS", "merge"]

LAYOUTS = ("source", "hf")


@checked
def merge(
    out: str | Path,
    dest: str | Path,
    *,
    layout: str = "source",
    revision: str | None = None,
    workers: int | None = None,
    sync: bool = True,
    progress: Progress = silent,
) -> tuple[str, ...]:
    """Write the source files of the resharded folder `out` into the folder `dest`, byte for byte as they were.

    If `out` is a Hub id or a URL, all its files are fetched to the cache first, at one `revision`.

    At the end each file's digest must be the one recorded of the source. With `layout` "hf" the files keep their names
    and get new headers, and no digest is compared: any tool opens the result, even if tensors were cast, quantized or
    dropped.
    The small files are copied, and an index is written anew. `dest` appears in one step, and an interrupted merge
    resumes, as with `convert`. `progress` is told of bytes written, and checked (see `reshard.process.Progress`).
    Returns the names of the weight files.

    Raises:
        BadInputError: tensors were cast, quantized, dequantised or dropped, so the source files cannot come back.
        IntegrityError: `out` is not complete, or a file differs from the source's.
        UsageError: no such layout.
        NetworkError: `out` is remote, and cannot be fetched.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"layout {printable(layout)}: not one of {', '.join(LAYOUTS)}")
    with staged_folder(destination(dest, sync=sync, progress=progress)) as stage:
        folder, _, _ = fetch(as_text(out), revision=revision, progress=progress)
        made = open_resharded(folder)
        layouts = _standard_files(made) if layout == "hf" else _source_files(made)
        total, index = sum(file.size for file in layouts), _index_names(made, layouts)
        part = stage.begin(digest_of(f"{layout} {digest_file(folder / MANIFEST_NAME)}".encode()))
        check_free_space(part, total)
        make_folders(part, [*(file.name for file in layouts), *index])
        with progress(total, "writing") as report, contextlib.closing(Journal(part)) as journal:
            write_files(
                part,
                layouts,
                Inputs(made.held, records=made.records),
                journal=journal,
                workers=workers,
                sync=sync,
                progress=report,
            )
        if layout == "source":
            with progress(total, "checking") as report:
                _check_digests(made, part, report)
        for extra in made.manifest.extras:
            if extra.name == REFERENCE_NAME:  # the conversion made it; the source has none
                continue
            copy_file(written_file(folder, extra), part, extra.name, sync=sync)
        for name in index:
            write_file(part / name, _index(layouts), sync=sync)
    return tuple(file.name for file in layouts)


def _source_files(made: Resharded) -> list[FileLayout]:
    """Return the layouts of the files as they were, with the recorded headers."""
    _check_undoable(made)
    layouts = []
    for file in made.source.files:
        slots = tuple(Slot(made.tensors[info.name], info.start) for info in file.header.tensors)
        layouts.append(FileLayout(file.name, file.header.head, slots, file.size))
    return layouts


def _check_undoable(made: Resharded) -> None:
    hint = "reshard merge --layout hf writes what there is"
    derived = made.manifest.derived
    if derived:
        kind, was = derived["quantized"], derived["dequantized"]
        how = f"quantized to {kind}, which loses bits" if kind else f"dequantised from {printable(was)}"
        raise BadInputError(f"the weights were {how}, when {printable(made.held.root)} was made of them", hint=hint)
    dropped = made.manifest.dropped
    if dropped:
        raise BadInputError(f"{len(dropped)} tensors of the source were dropped: {listed(dropped)}", hint=hint)
    stored = {name: torch_name(info.dtype, tensor=name) for name, info in made.source.tensors.items()}
    cast = [name for name, tensor in made.tensors.items() if tensor.dtype != stored[name]]
    if cast:
        raise BadInputError(
            f"{len(cast)} tensors were cast to another dtype, which loses bits: {listed(cast)}",
            hint=hint,
        )


def _standard_files(made: Resharded) -> list[FileLayout]:
    """Return layouts with new headers, for the tensors that are left, in the dtypes that they have now."""
    layouts, written = [], set[str]()  # a tensor that is in two files is written once
    for file in made.source.files:
        # The header describes a tensor in its own shape; it is filled in a shape as fine as its regions.
        shapes = {
            info.name: info.shape
            for info in file.header.tensors
            if info.name in made.tensors and info.name not in written
        }
        described = [replace(made.tensors[name], shape=shape) for name, shape in shapes.items()]
        if described:
            written |= shapes.keys()
            layout = file_layout(file.name, described)
            slots = tuple(Slot(made.tensors[slot.tensor.name], slot.offset) for slot in layout.slots)
            layouts.append(replace(layout, slots=slots))
    return layouts


def _index_names(made: Resharded, layouts: Sequence[FileLayout]) -> list[str]:
    """Return the path of the index to write, if one is needed.

    It is the path that the configuration names, else `INDEX_NAME`. Without an index, files of other names or in other
    folders could only be found by an option.
    """
    try:
        named = weights_named_by(made.source.config)
    except (BadInputError, PolicyError):  # an option said where the weights are
        named = None
    if [file.name for file in layouts] == [named or SINGLE_NAME]:
        return []
    return [named if named and named.endswith(INDEX_SUFFIX) else INDEX_NAME]


def _check_digests(made: Resharded, part: Path, report: Advance) -> None:
    for file in made.manifest.source_files:
        if f"{ALGORITHM}:{digest_file(part / file['file'])}" != file["digest"]:
            raise IntegrityError(
                f"{printable(made.held.root)}: {printable(file['file'])} does not come out as it went in",
                hint="reshard verify says which file was altered; if none was, it has NaNs that a wider dtype does not"
                " keep bit for bit: use --layout hf",
            )
        report(file["size"])


def _index(layouts: Sequence[FileLayout]) -> bytes:
    """Return `model.safetensors.index.json` as transformers' save_pretrained writes it."""
    places: Mapping[str, str] = {slot.tensor.name: file.name for file in layouts for slot in file.slots}
    total = sum(slot.tensor.nbytes for file in layouts for slot in file.slots)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()

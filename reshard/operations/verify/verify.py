"""Offline checks of a resharded folder: every byte against the manifest, every element against the source."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...checkpoint.weights import AS_FOUND, chosen
from ...errors import IntegrityError, UsageError
from ...execution.parts.share import Part, ranks_of
from ...process import Progress, silent
from ...resharded.manifest import Manifest, read_manifest
from ...resharded.rank_file import check_file
from ...resharded.strangers import missing_and_strange
from ...storage.locate import local_folder
from ...storage.stores import as_text
from ...text import printable
from ..arguments import checked
from ..convert.which import which_part

__all__ = ["Report", "verify"]


@dataclass(frozen=True, slots=True)
class Report:
    """Files, tensors and bytes checked by digest, and elements compared with the source (None: not asked for). `part`
    is the one that was checked, None if all was."""

    files: int
    tensors: int
    size: int
    elements: int | None = None
    part: Part | None = None


@checked
def verify(
    out: str | Path,
    *,
    against: str | Path | None = None,
    revision: str | None = None,
    weights: str | None = None,
    links_into: Sequence[str | Path] = (),
    part: str | None = None,
    progress: Progress = silent,
) -> Report:
    """Check that no file of a resharded folder is missing, extra or altered.

    With `against`, also compare every element with the source checkpoint (folder, Hub id or URL) it was made from;
    `revision`, `weights` and `links_into` are those of `convert`. `part`, "I/K" or "auto" as in `convert_part`, checks
    the rank files of that part alone, so that K machines share the work; part 1 checks the other files too. `progress`
    is told of bytes checked, and compared (see `reshard.process.Progress`).

    Raises:
        IntegrityError: a check fails. The error names the file, and the tensor if it is in one.
        BadInputError: `out` is not a resharded folder, or was not made from `against`.
        UsageError: `revision`, `weights` or `links_into` without `against`; no such part; or `out` is a URL.
        VersionError: a newer release made the folder.
    """
    if revision is not None and against is None:
        raise UsageError("--revision is that of the source to compare with", hint="give --against too")
    choice = chosen(weights, links_into)
    if choice != AS_FOUND and against is None:
        raise UsageError("--weights and --links-into are of the source to compare with", hint="give --against too")
    folder = local_folder(out)
    manifest = read_manifest(folder)
    _check_names(folder, manifest)
    which = Part(1, 1) if part is None else which_part(part, os.environ)
    ranks = ranks_of(which, manifest.world_size)
    others = manifest.files()[manifest.world_size :] if which.number == 1 else ()
    records = (*(manifest.rank_files[rank] for rank in ranks), *others)
    with progress(sum(record.size for record in records), "checking") as report:
        for record in records:
            check_file(folder, record, report)
    elements = None
    if against is not None:
        from .compare import compare_with_source

        elements = compare_with_source(
            folder, manifest, as_text(against), ranks, revision=revision, choice=choice, progress=progress
        )
    return Report(
        len(records),
        sum(len(record.tensors) for record in records),
        sum(record.size for record in records),
        elements,
        None if part is None else which,
    )


def _check_names(folder: Path, manifest: Manifest) -> None:
    missing, strange = missing_and_strange(folder, manifest)
    for name in missing:
        raise IntegrityError(f"{printable(folder / name)}: is missing")
    for name in strange:
        raise IntegrityError(
            f"{printable(folder / name)}: does not belong to this folder",
            hint="if it is yours, keep it elsewhere: a resharded folder holds what its manifest lists and no more",
        )

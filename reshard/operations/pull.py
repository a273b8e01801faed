"""Only what some ranks need of a repo: their files and the small ones, at one commit, every digest checked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..checkpoint.source import MANIFEST_NAME
from ..errors import (
    BadInputError,
    DestinationExistsError,
    IntegrityError,
    PolicyError,
    ReshardError,
    TopologyError,
    UsageError,
)
from ..process import Progress, silent
from ..resharded.manifest import Manifest
from ..resharded.rank_file import FileRecord, check_file
from ..storage.disk import discard
from ..storage.hub.address import Place
from ..storage.locate import Found, away, fetch_files, find_resharded, local_folder
from ..storage.remote import sha256_of
from ..storage.stores import is_url
from ..text import printable
from .arguments import checked

__all__ = ["pull"]


@checked
def pull(
    place: str,
    *,
    ranks: Iterable[int] | None = None,
    revision: str | None = None,
    to: str | Path | None = None,
    progress: Progress = silent,
) -> Path:
    """Fetch a resharded repo (`org/name`, or a folder of it, `org/name/tp4`), or only the files of some ranks.

    They go into the Hub's cache, or below the folder `to`, as they are in the repo. What is there already is not
    fetched, and nothing is asked of the network if all of it is there and HF_HUB_OFFLINE is set. Returns the folder.

    Raises:
        TopologyError: there is no such rank.
        UsageError: `ranks` are none.
        IntegrityError: a file is not what the manifest says. It is removed, so that the next run fetches it again.
        DestinationExistsError: in `to` there is another model, or a file in the way.
        NetworkError: the Hub cannot be reached, or does not give it; what has arrived is kept.
    """
    if os.path.exists(place):
        raise BadInputError(f"{printable(place)}: is a local folder", hint="pull takes a Hub id or a URL")
    found = find_resharded(place, revision=revision)
    records = _wanted(found, None if ranks is None else sorted(set(ranks)))
    names = [record.name for record in records]
    target = None if to is None else _vacant(local_folder(to), found, records)
    below, total = None if to is None else local_folder(to), sum(record.size for record in records)
    with progress(total, "fetching") as report:
        folder = fetch_files(place, names, version=found.version, to=below, report=report)
    with progress(total, "checking") as report:
        for record in records:
            try:
                check_file(folder, record, report)
            except IntegrityError as error:
                so_there = _so_there(found, record, folder / record.name)
                discard(folder / record.name)
                again = "it is so there: it has to be published anew" if so_there else "run it again to fetch it again"
                raise IntegrityError(error.message, hint=f"it was removed: {again}") from None
    if target is not None:
        shutil.copyfile(found.folder / MANIFEST_NAME, target)  # last, as everywhere
    return folder


def _so_there(found: Found, record: FileRecord, path: Path) -> bool:
    """Whether a file is the one that is at the place, which then holds another than its manifest says."""
    try:
        entry = away(found.place, str(found.version)).entries([record.name])[0]
    except ReshardError:  # it is not known
        return False
    return entry.size != record.size or (entry.sha256 is not None and entry.sha256 == sha256_of(path))


def _wanted(found: Found, ranks: list[int] | None) -> list[FileRecord]:
    """All files, or those of some ranks and the small ones."""
    manifest: Manifest = found.manifest
    if ranks is None:
        return list(manifest.files())
    if not ranks:
        raise UsageError("no ranks to fetch", hint="leave out --ranks for all of them")
    wrong = [rank for rank in ranks if not 0 <= rank < manifest.world_size]
    if wrong:
        raise TopologyError(
            f"{printable(found.place)}: has no rank {wrong[0]}", hint=f"its ranks are 0 to {manifest.world_size - 1}"
        )
    return [*(manifest.rank_files[rank] for rank in ranks), *manifest.extras]


def _vacant(to: Path, found: Found, records: list[FileRecord]) -> Path:
    """Where the manifest goes below `to`. Raises DestinationExistsError where anything would be replaced."""
    folder = to if is_url(found.place) else to / Place.parse(found.place).path
    target = folder / MANIFEST_NAME
    if os.path.lexists(target):
        if target.read_bytes() != (found.folder / MANIFEST_NAME).read_bytes():
            raise DestinationExistsError(f"{printable(folder)}: holds another resharded model")
        return target
    for record in records:  # an interrupted pull has left some of them, whole
        if os.path.lexists(folder / record.name):
            try:
                check_file(folder, record)
            except (IntegrityError, PolicyError, BadInputError):
                raise DestinationExistsError(
                    f"{printable(folder / record.name)}: is there already, and is not what would be fetched",
                    hint="choose another folder with --to, or move it away",
                ) from None
    return target

"""The download of a resharded repo, or of the files that some ranks need, at one commit, every digest checked."""

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
from ..execution.parts.share import ranks_of
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
from .convert.which import which_part

__all__ = ["pull"]


@checked
def pull(
    place: str,
    *,
    ranks: Iterable[int] | None = None,
    part: str | None = None,
    revision: str | None = None,
    to: str | Path | None = None,
    progress: Progress = silent,
) -> Path:
    """Fetch a resharded repo (`org/name`, or a folder of it, `org/name/tp4`), or only the files of some ranks: `ranks`,
    or the ranks of a `part`, which says what it says to `convert_part`. Part 2/8 has the ranks of the second of 8
    machines, if torchrun deals ranks out to them in order.

    The files go into the cache, or below the folder `to`, with their paths in the repo. Files that are there already
    are not fetched; if all are there and HF_HUB_OFFLINE is set, no request is made. Returns the folder.

    Raises:
        TopologyError: there is no such rank.
        UsageError: `ranks` is empty, or there is no such part, or both are given.
        IntegrityError: a file is not the one in the manifest. It is removed, so that the next run fetches it again.
        DestinationExistsError: `to` holds another model, or a file in the way.
        NetworkError: the Hub cannot be reached, or refuses; what has arrived is kept.
    """
    if os.path.exists(place):
        raise BadInputError(f"{printable(place)}: is a local folder", hint="pull takes a Hub id or a URL")
    if part is not None and ranks is not None:
        raise UsageError("both --ranks and --part are given", hint="leave out one of them")
    which = None if part is None else which_part(part, os.environ)
    found = find_resharded(place, revision=revision)
    if which is not None:
        ranks = ranks_of(which, found.manifest.world_size)
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
                again = "the repo itself is wrong: publish it again" if so_there else "run it again to fetch it again"
                raise IntegrityError(error.message, hint=f"it was removed: {again}") from None
    if target is not None:
        shutil.copyfile(found.folder / MANIFEST_NAME, target)  # last: it says that the folder is complete
    return folder


def _so_there(found: Found, record: FileRecord, path: Path) -> bool:
    """Whether the repo itself holds a wrong file: of another size than its manifest says, or just the one fetched."""
    try:
        entry = away(found.place, str(found.version)).entries([record.name])[0]
    except ReshardError:  # what the repo holds cannot be found out
        return False
    return entry.size != record.size or (entry.sha256 is not None and entry.sha256 == sha256_of(path))


def _wanted(found: Found, ranks: list[int] | None) -> list[FileRecord]:
    """Return the records of all files, or of the given ranks' files and the small ones."""
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
    """Return the manifest's path below `to`. Raises DestinationExistsError if anything would be replaced."""
    folder = to if is_url(found.place) else to / Place.parse(found.place).path
    target = folder / MANIFEST_NAME
    if os.path.lexists(target):
        if target.read_bytes() != (found.folder / MANIFEST_NAME).read_bytes():
            raise DestinationExistsError(f"{printable(folder)}: holds another resharded model")
        return target
    for record in records:  # an interrupted pull has left some of them, complete
        if os.path.lexists(folder / record.name):
            try:
                check_file(folder, record)
            except (IntegrityError, PolicyError, BadInputError):
                raise DestinationExistsError(
                    f"{printable(folder / record.name)}: is there already, and is not what would be fetched",
                    hint="choose another folder with --to, or move it away",
                ) from None
    return target

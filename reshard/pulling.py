"""Only what some ranks need of a repo: their files and the small ones, at one commit, every digest checked."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from .digest import FileRecord
from .errors import (
    BadInputError,
    DestinationExistsError,
    IntegrityError,
    PolicyError,
    TopologyError,
    UsageError,
    printable,
)
from .hub.place import Place, discard
from .manifest import Manifest
from .places import Found, find_resharded, locate
from .source import MANIFEST_NAME
from .stores import is_url
from .verification import check_file

__all__ = ["pull"]


def pull(
    place: str,
    *,
    ranks: Iterable[int] | None = None,
    revision: str | None = None,
    to: str | Path | None = None,
    progress: Callable[[int], object] = lambda _: None,
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
    target = None if to is None else _vacant(Path(to), found, records)
    folder, _, _ = locate(
        place,
        revision=found.version,
        patterns=[glob.escape(name) for name in names],
        ignored=(),
        to=None if to is None else Path(to),
    )
    for record in records:
        try:
            check_file(folder, record, progress)
        except IntegrityError as error:
            discard(folder / record.name)
            raise IntegrityError(error.message, hint="it was removed: run it again to fetch it again") from None
    if target is not None:
        shutil.copyfile(found.folder / MANIFEST_NAME, target)  # last, as everywhere
    return folder


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

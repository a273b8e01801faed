"""Where a checkpoint or a resharded folder is, here, on the Hub or in an object store, and what of it is here."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.companions import Item
from ..checkpoint.left_behind import files_here
from ..checkpoint.source import MANIFEST_NAME, Source, companions_of, is_resharded, open_source
from ..checkpoint.weights import AS_FOUND, Choice
from ..errors import BadInputError, IntegrityError, NetworkError, TopologyError, UsageError
from ..process import Advance, Progress, silent
from ..resharded.manifest import Manifest, read_manifest
from ..text import listed, printable
from .disk import discard
from .hub.address import Place, is_hub_url
from .hub.files import HubFiles
from .hub.snapshot import folders as hub_folders
from .hub.snapshot import is_offline
from .hub.snapshot import snapshot as hub_snapshot
from .remote import Away, remote_weights
from .stores import as_text, is_url, open_store
from .stores import snapshot as store_snapshot

__all__ = [
    "Found",
    "away",
    "fetch",
    "fetch_files",
    "find_resharded",
    "local_folder",
    "locate",
    "look_at",
    "of_hub",
    "resolve_source",
]

# What says which other files there are (shell patterns).
FIRST_FILES = ("config.json", "*.index.json", "*.index.*.json", MANIFEST_NAME)
_NO_FOLDERS = ("*/*",)


@dataclass(frozen=True, slots=True)
class Found:
    """A resharded folder: what to call it by, where its manifest is, and its version if it is not of this machine."""

    place: str
    folder: Path
    manifest: Manifest
    version: str | None


def locate(
    place: str,
    *,
    revision: str | None = None,
    patterns: Sequence[str] = FIRST_FILES,
    ignored: Sequence[str] = _NO_FOLDERS,
    to: Path | None = None,
    report: Advance | None = None,
) -> tuple[Path, str | None, str | None]:
    """A local folder, or what is fetched of another place: (folder, place, version). The last two are None for one that
    is here.

    `place` is a folder, `org/name` on the Hub, a folder of a repo, `org/name/path`, or the URL of a folder in an object
    store. Of those, only the files that match `patterns` are fetched, into the cache unless `to` says where; those
    already there are used. A version is a commit of the Hub, or tells one state of a store's folder from another, and
    can be given as `revision`.

    Raises:
        NetworkError: the place cannot be reached, or does not give it.
        BadInputError: `place` is none of these, or there is nothing.
        UsageError: a revision of what has none.
        RemoteMovedError: a store's folder is not at that version any more.
    """
    if is_url(place):
        folder, version = store_snapshot(
            place, version=revision, patterns=patterns, ignored=ignored, to=to, report=report
        )
        return folder, place, version
    if os.path.exists(place):  # not Path's, which fails where the name is too long for one
        if revision is not None:
            raise UsageError(f"{printable(place)}: a local folder has no revisions", hint="leave out --revision")
        return Path(place), None, None
    where = Place.parse(place)
    folder, commit = hub_snapshot(where, revision=revision, patterns=patterns, ignored=ignored, to=to, report=report)
    return folder, str(where), commit


def away(place: str, version: str) -> Away:
    """The files of what `locate` has found elsewhere."""
    return open_store(place, version) if is_url(place) else HubFiles(Place.parse(place), version)


def find_resharded(place: str, *, revision: str | None = None, world_size: int | None = None) -> Found:
    """The resharded folder at `place`; or where that is not for `world_size`, its folder `tpN`, if there is one.

    Of what is elsewhere, only manifests are fetched.

    Raises:
        BadInputError: there is none.
        TopologyError: there are such folders, but none of them is `tpN`.
        IntegrityError: the manifest was altered; it is not kept in the cache.
    """
    choices = [""] if world_size is None else ["", f"tp{world_size}"]
    for_others = None
    for name, folder, fetched, version in _candidates(place, revision, choices):
        if (folder / MANIFEST_NAME).exists():
            try:
                found = Found(name, folder, read_manifest(folder), version)
            except IntegrityError:
                if fetched:
                    discard(folder / MANIFEST_NAME)
                raise
            if world_size in (None, found.manifest.world_size):
                return found
            for_others = for_others or found
    if for_others:  # which whoever asked can say more about
        return for_others
    there = _folders(place, revision)
    if there:
        fitting = f" for {world_size} ranks" if world_size else ""
        raise TopologyError(
            f"{printable(place)}: holds no model{fitting} itself, but in folders: {listed(there, most=20)}",
            hint=f"name one of them: {printable(place)}/{printable(there[0])}"
            + (", and start as many ranks as it is for" if world_size else ""),
        )
    if os.path.exists(place):
        read_manifest(Path(place))  # says what is wrong
    raise BadInputError(f"{printable(place)}: holds no {MANIFEST_NAME}, so it is not a resharded one")


def _candidates(
    place: str, revision: str | None, choices: Sequence[str]
) -> Iterator[tuple[str, Path, bool, str | None]]:
    """Each choice of a folder below `place`: (place, folder, whether it was fetched, version)."""
    if is_url(place):  # a version is that of one folder
        for choice in choices:
            name = f"{place.rstrip('/')}/{choice}".rstrip("/")
            try:
                folder, _, version = locate(name, revision=revision, patterns=[MANIFEST_NAME], ignored=())
            except BadInputError:
                if choice:
                    return
                raise
            yield name, folder, True, version
        return
    patterns = [f"{choice}/{MANIFEST_NAME}".lstrip("/") for choice in choices]
    root, found, version = locate(place, revision=revision, patterns=patterns, ignored=())
    for choice in choices:
        yield f"{found or place}/{choice}".rstrip("/"), root / choice, found is not None, version


def _folders(place: str, revision: str | None) -> list[str]:
    """The folders inside that hold a manifest, by the number in their names."""
    if is_url(place):
        store = open_store(place)
        found = [name for name in store.folders if MANIFEST_NAME in open_store(f"{store.url}/{name}").files]
    elif os.path.exists(place):
        found = [path.parent.name for path in Path(place).glob(f"*/{MANIFEST_NAME}")]
    else:
        found = hub_folders(Place.parse(place), revision, MANIFEST_NAME)
    return sorted(found, key=lambda name: [int(part) if part.isdigit() else 0 for part in re.split(r"(\d+)", name)])


def fetch_files(
    place: str,
    names: Sequence[str],
    *,
    version: str | None,
    to: Path | None = None,
    report: Advance | None = None,
) -> Path:
    """Fetch files of a resharded folder that is elsewhere, by names of its manifest, as `locate` does. Returns the
    folder that they are in.

    Raises:
        IntegrityError: some are not there.
        NetworkError: the place cannot be reached.
    """
    patterns = [glob.escape(name) for name in names]
    folder, _, _ = locate(place, revision=version, patterns=patterns, ignored=(), to=to, report=report)
    absent = [name for name in names if not os.path.lexists(folder / name)]
    if absent:
        raise IntegrityError(
            f"{printable(place)}: has no {listed(absent)}, which its {MANIFEST_NAME} names",
            hint="it has to be published anew, whole; what it was made from can be converted",
        )
    return folder


def local_folder(place: str | Path) -> Path:
    """The path of a folder that is to be on this machine. Raises UsageError for a URL."""
    text = as_text(place)
    if is_url(text) or is_hub_url(text):
        raise UsageError(
            f"{printable(text)}: is not on this machine", hint="take a folder that is; reshard pull fetches one"
        )
    return Path(text)


def look_at(
    place: str, *, revision: str | None = None, choice: Choice = AS_FOUND, include: Sequence[str] = ()
) -> tuple[Path, str | None, str | None, tuple[Item, ...]]:
    """`locate` a checkpoint, or a resharded one, with all its files but the weights: (folder, place, version, items).

    The last are all its files, as they are elsewhere; none for one that is here, or is resharded.
    """
    root, found, version = locate(place, revision=revision)
    if found is None or version is None:
        return root, found, version, ()
    if is_resharded(root):
        fetch_files(place, [extra.name for extra in read_manifest(root).extras], version=version)
        return root, found, version, ()
    there = away(found, version)
    items = _items(there, root)
    weights = remote_weights(root, there, items, choice)
    patterns = [glob.escape(name) for name in companions_of(items, weights, include=include)]
    locate(place, revision=version, patterns=patterns, ignored=())
    return root, found, version, items


def _items(there: Away, root: Path) -> tuple[Item, ...]:
    """The files of a place; where nothing is to be asked and no list was kept, those that are in the cache."""
    try:
        return tuple(there.items())
    except NetworkError:
        if not is_offline():
            raise
        return tuple(files_here(root))


def fetch(
    place: str, *, revision: str | None = None, choice: Choice = AS_FOUND, progress: Progress = silent
) -> tuple[Path, str | None, str | None]:
    """`look_at` a checkpoint, or a resharded one, and fetch its weights too, of which `progress` is told: (folder,
    place, version)."""
    root, found, version, items = look_at(place, revision=revision, choice=choice)
    if found is not None and is_resharded(root):
        records = read_manifest(root).files()
        with progress(sum(record.size for record in records), "fetching") as report:
            fetch_files(place, [record.name for record in records], version=version, report=report)
    elif found is not None and version is not None:
        weights = remote_weights(root, away(found, version), items, choice)
        patterns = [glob.escape(name) for name in weights.files]
        with progress(sum(item.size or 0 for item in items if item.path in weights.files), "fetching") as report:
            locate(place, revision=version, patterns=patterns, ignored=(), report=report)
    return root, found, version


def resolve_source(
    place: str, *, revision: str | None = None, choice: Choice = AS_FOUND, progress: Progress = silent
) -> Source:
    """Open a checkpoint: a local folder, or one elsewhere, whose files are fetched to the cache."""
    root, found, version = fetch(place, revision=revision, choice=choice, progress=progress)
    repo_id, commit = of_hub(found, version)
    return open_source(root, choice=choice, repo_id=repo_id, commit=commit)


def of_hub(place: str | None, version: str | None) -> tuple[str | None, str | None]:
    """Repo id and commit of what `locate` has found, if it is of the Hub."""
    return (None, None) if place is None or is_url(place) else (place, version)

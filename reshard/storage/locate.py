"""Checkpoints and resharded folders by name: found here, on the Hub or in an object store, and fetched from there."""

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

# The files that say which other files there are (shell patterns).
FIRST_FILES = ("config.json", "*.index.json", "*.index.*.json", MANIFEST_NAME)
_NO_FOLDERS = ("*/*",)


@dataclass(frozen=True, slots=True)
class Found:
    """A resharded folder: what to call it, where its manifest is, and its version if it is not on this machine."""

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
    """Return a local folder, or fetch one from elsewhere: (folder, place, version).

    `place` is a folder, `org/name` on the Hub, a folder of a repo, `org/name/path`, or the URL of a folder in an object
    store. If it is a local folder, the last two results are None. Otherwise only the files that match `patterns` are
    fetched, into `to` or else the cache; those already there are used. A version is a commit of the Hub, or tells one
    state of a store's folder from another. Either can be given as `revision`.

    Raises:
        NetworkError: the place cannot be reached, or does not give it.
        BadInputError: `place` is none of these, or there is nothing.
        UsageError: `place` has no revisions, and one is given.
        RemoteMovedError: a store's folder is not at that version any more.
    """
    if is_url(place):
        folder, version = store_snapshot(
            place, version=revision, patterns=patterns, ignored=ignored, to=to, report=report
        )
        return folder, place, version
    if os.path.exists(place):  # Path's `exists` fails if the name is too long
        if revision is not None:
            raise UsageError(f"{printable(place)}: a local folder has no revisions", hint="leave out --revision")
        return Path(place), None, None
    where = Place.parse(place)
    folder, commit = hub_snapshot(where, revision=revision, patterns=patterns, ignored=ignored, to=to, report=report)
    return folder, str(where), commit


def away(place: str, version: str) -> Away:
    """Return the files of a folder that `locate` has found elsewhere."""
    return open_store(place, version) if is_url(place) else HubFiles(Place.parse(place), version)


def find_resharded(place: str, *, revision: str | None = None, world_size: int | None = None) -> Found:
    """Find the resharded folder at `place` or, if that is not for `world_size` ranks, its folder `tpN`.

    If neither is for `world_size` ranks, the first that exists is returned. If `place` is elsewhere, only manifests are
    fetched.

    Raises:
        BadInputError: there is none.
        TopologyError: there are resharded folders inside, but none of them is `tpN`.
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
    if for_others:  # the caller can say more about it
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
    """Yield each choice of a folder below `place`: (place, folder, whether it was fetched, version)."""
    if is_url(place):  # each folder has a version of its own
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
    """Return the folders inside that hold a manifest, sorted by the number in their names."""
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
    """Fetch files of a resharded folder elsewhere, as `locate` does, and return the folder that they are in.

    `names` are those in its manifest.

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
    """Return the path of a folder that must be on this machine. Raises UsageError for a URL."""
    text = as_text(place)
    if is_url(text) or is_hub_url(text):
        raise UsageError(
            f"{printable(text)}: is not on this machine", hint="take a folder that is; reshard pull fetches one"
        )
    return Path(text)


def look_at(
    place: str, *, revision: str | None = None, choice: Choice = AS_FOUND, include: Sequence[str] = ()
) -> tuple[Path, str | None, str | None, tuple[Item, ...]]:
    """Find a checkpoint or a resharded folder, and fetch all but the weights: (folder, place, version, items).

    `items` are all its files, as they are elsewhere. They are empty if it is on this machine, or resharded. See
    `locate`.
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
    """Return the files of a place; offline, if no list was kept, those that are in the cache."""
    try:
        return tuple(there.items())
    except NetworkError:
        if not is_offline():
            raise
        return tuple(files_here(root))


def fetch(
    place: str, *, revision: str | None = None, choice: Choice = AS_FOUND, progress: Progress = silent
) -> tuple[Path, str | None, str | None]:
    """Find and fetch a checkpoint or a resharded folder, weights too: (folder, place, version).

    `progress` is told of the weights. See `look_at`.
    """
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
    """Open a checkpoint. If it is elsewhere, its files are fetched to the cache."""
    root, found, version = fetch(place, revision=revision, choice=choice, progress=progress)
    repo_id, commit = of_hub(found, version)
    return open_source(root, choice=choice, repo_id=repo_id, commit=commit)


def of_hub(place: str | None, version: str | None) -> tuple[str | None, str | None]:
    """Return repo id and commit of what `locate` has found; None for both unless it is on the Hub."""
    return (None, None) if place is None or is_url(place) else (place, version)

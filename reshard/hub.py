"""The Hugging Face Hub, through huggingface_hub alone."""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import BadInputError, IntegrityError, TopologyError, listed, printable
from .hub_errors import explain
from .manifest import Manifest, read_manifest
from .source import MANIFEST_NAME, NOT_WANTED, SMALL_FILES, Source, is_resharded, open_source, weight_files

__all__ = ["Found", "Place", "client", "discard", "fetch", "find_resharded", "locate", "resolve_source"]

_NAME = r"[A-Za-z0-9][\w.-]*"
_PLACE = re.compile(rf"({_NAME}(?:/{_NAME})?)((?:/{_NAME})*)")
_PATIENCE = 6  # times the client's own timeout of a download


@dataclass(frozen=True, slots=True)
class Place:
    """A Hub repo, or a folder of one: `org/name`, or `org/name/path`."""

    repo_id: str
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Place:
        """Raises BadInputError where it is not one."""
        match = _PLACE.fullmatch(text)
        if match is None:
            raise BadInputError(f"{printable(text)}: no such folder, and not a Hub id such as org/name")
        return cls(match[1], match[2].lstrip("/"))

    def inside(self, name: str) -> str:
        """A file's path in the repo."""
        return f"{self.path}/{name}" if self.path else name

    def __str__(self) -> str:
        return f"{self.repo_id}/{self.path}" if self.path else self.repo_id


@dataclass(frozen=True, slots=True)
class Found:
    """A resharded folder: what to call it by, where its manifest is, and the commit if that is of the Hub."""

    place: str
    folder: Path
    manifest: Manifest
    commit: str | None


def client() -> None:
    """Have the client never wait for ever, which it does by default, and show bars only on a terminal."""
    from huggingface_hub.utils import disable_progress_bars, get_session

    if not sys.stderr.isatty():
        disable_progress_bars()
    hooks = get_session().event_hooks["request"]
    if _be_patient not in hooks:
        hooks.append(_be_patient)


def _be_patient(request: Any) -> None:
    """Before a request is sent: some calls of the client's ask for no timeout at all."""
    from huggingface_hub import constants

    timeout = request.extensions.get("timeout", {})
    longest = _PATIENCE * constants.HF_HUB_DOWNLOAD_TIMEOUT
    bounded = {of: timeout.get(of) or longest for of in ("connect", "read", "write", "pool")}
    request.extensions = {**request.extensions, "timeout": bounded}


def locate(
    place: str,
    *,
    revision: str | None = None,
    patterns: Sequence[str] = SMALL_FILES,
    ignored: Sequence[str] = NOT_WANTED,
    to: Path | None = None,
) -> tuple[Path, str | None, str | None]:
    """A local folder, or the snapshot of a Hub repo pinned to one commit: (folder, repo id, commit).

    `place` is a folder, `org/name`, or a folder of a repo, `org/name/path`. Of a repo, only the files that match
    `patterns` are fetched, into the cache unless `to` says where; those already there are used.

    Raises:
        NetworkError: the Hub cannot be reached, or does not give it.
        BadInputError: `place` is neither a folder nor a Hub id.
    """
    path = Path(place)
    if path.exists():
        return path, None, None
    where = Place.parse(place)

    from huggingface_hub import snapshot_download

    client()
    try:
        root = snapshot_download(
            where.repo_id,
            revision=revision,
            allow_patterns=[where.inside(pattern) for pattern in patterns],
            ignore_patterns=[where.inside(pattern) for pattern in ignored],
            local_dir=to,
        )
    except Exception as error:  # the client lets through whatever its transport and its parsers raise
        raise explain(error, place, revision=revision) from None
    return Path(root, where.path), place, revision if to else Path(root).name


def find_resharded(place: str, *, revision: str | None = None, world_size: int | None = None) -> Found:
    """The resharded folder at `place`, or for a `world_size` its folder `tpN`. Of a repo, only manifests are fetched.

    Raises:
        BadInputError: there is none.
        TopologyError: there are such folders, but none of them is `tpN`.
        IntegrityError: the manifest was altered; it is not kept in the cache.
    """
    choices = [""] if world_size is None else ["", f"tp{world_size}/"]
    root, repo_id, commit = locate(
        place, revision=revision, patterns=[choice + MANIFEST_NAME for choice in choices], ignored=()
    )
    for choice in choices:
        if (root / choice / MANIFEST_NAME).exists():
            folder = root / choice
            try:
                return Found(f"{place}/{choice}".rstrip("/"), folder, read_manifest(folder), commit)
            except IntegrityError:
                if repo_id is not None:
                    discard(folder / MANIFEST_NAME)
                raise
    there = _folders(root, repo_id, commit)
    if there:
        fitting = f" for {world_size} ranks" if world_size else ""
        raise TopologyError(
            f"{printable(place)}: holds no model{fitting} itself, but in folders: {listed(there, most=20)}",
            hint=f"name one of them: {printable(place)}/{printable(there[0])}",
        )
    if repo_id is None:
        read_manifest(root)  # says what is wrong
    raise BadInputError(f"{printable(place)}: the repo holds no {MANIFEST_NAME}, so it is not a resharded one")


def _folders(root: Path, repo_id: str | None, commit: str | None) -> list[str]:
    """The folders inside that hold a manifest, by the number in their names."""
    if repo_id is None:
        found = [path.parent.name for path in root.glob(f"*/{MANIFEST_NAME}")]
    else:
        from huggingface_hub import get_cached_repo_tree

        where = Place.parse(repo_id)
        tree = get_cached_repo_tree(where.repo_id, revision=commit)  # `locate` has left it there
        found = [
            str(path.parent.relative_to(where.path))
            for path in (PurePosixPath(entry.path) for entry in tree)
            if path.name == MANIFEST_NAME and path.is_relative_to(where.path)
        ]
    return sorted(found, key=lambda name: [int(part) if part.isdigit() else 0 for part in re.split(r"(\d+)", name)])


def discard(path: Path) -> None:
    """Remove a file of the cache and what it links to, so that it is fetched again."""
    while True:
        target = path.parent / path.readlink() if path.is_symlink() else None
        path.unlink(missing_ok=True)
        if target is None:
            return
        path = target


def fetch(place: str, *, revision: str | None = None) -> tuple[Path, str | None, str | None]:
    """`locate` a checkpoint, or a resharded one, with its weights: (folder, repo id, commit)."""
    root, repo_id, commit = locate(place, revision=revision)
    if repo_id is not None:
        weights = [file.name for file in read_manifest(root).files()] if is_resharded(root) else weight_files(root)
        locate(place, revision=commit, patterns=[glob.escape(name) for name in weights])
    return root, repo_id, commit


def resolve_source(place: str, *, revision: str | None = None) -> Source:
    """Open a checkpoint: a local folder, or a Hub id, of which just the files it needs are fetched into the cache."""
    root, repo_id, commit = fetch(place, revision=revision)
    return open_source(root, repo_id=repo_id, commit=commit)

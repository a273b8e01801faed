"""The files of a Hub repo that match patterns, at one commit, in the cache or a folder."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import NetworkError
from ...process import Advance
from ...text import printable
from .address import Place
from .errors import explain
from .session import again, bar_that_tells, client, is_unreachable

__all__ = ["files", "folders", "is_offline", "snapshot"]

_log = logging.getLogger(__name__)


def is_offline() -> bool:
    """Whether the user wants only the cache used, and the Hub not asked."""
    from huggingface_hub import constants

    return constants.is_offline_mode()


def snapshot(
    where: Place,
    *,
    revision: str | None,
    patterns: Sequence[str],
    ignored: Sequence[str],
    to: Path | None,
    report: Advance | None = None,
) -> tuple[Path, str | None]:
    """Fetch the files of a place that match `patterns`, at one commit, into `to` or the cache: (folder, commit).

    `report` is told of bytes that arrive; the client then shows no bars. Offline, or if the Hub does not answer, the
    commit is the one that the cache knows by that name; the log tells the latter.

    Raises:
        NetworkError: the Hub cannot be reached, or does not give it.
        StorageError: it cannot be kept.
    """
    from huggingface_hub import snapshot_download

    fetch = partial(
        snapshot_download,
        where.repo_id,
        allow_patterns=[where.inside(pattern) for pattern in patterns],
        ignore_patterns=[where.inside(pattern) for pattern in ignored],
        local_dir=to,
        tqdm_class=None if report is None else bar_that_tells(report),
    )
    try:
        with client():
            if is_offline():
                root = Path(fetch(revision=revision, local_files_only=True))
            else:
                root = _online(where, revision, to, fetch)
    except Exception as error:  # the client lets through whatever its transport and its parsers raise
        raise explain(error, str(where), revision=revision) from None
    return root / where.path, revision if to else root.name


def _online(where: Place, revision: str | None, to: Path | None, fetch: Callable[..., str]) -> Path:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        commit = _commit(where.repo_id, revision)
    except Exception as error:
        if not is_unreachable(error):
            raise
        try:
            root = Path(fetch(revision=revision, local_files_only=True))
        except LocalEntryNotFoundError as missing:
            raise missing from error
        if not _is_listed(where.repo_id, revision, to):  # not all that was asked for may be there
            raise
        _log.warning("%s: the Hub does not answer; using commit %s of the cache", where, root.name)
        return root
    root = Path(again(lambda: fetch(revision=commit)))
    if not _is_listed(where.repo_id, commit, to):  # the Hub gave no list, or it could not be kept
        again(lambda: next(iter(HfApi().list_repo_tree(where.repo_id, revision=commit)), None))
    if to is None and commit != revision:
        _remember(root, revision or "main", commit)
    return root


def _commit(repo_id: str, revision: str | None) -> str:
    """Return the commit that a branch or tag points to now."""
    from huggingface_hub import HfApi

    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    commit = again(lambda: HfApi().model_info(repo_id, revision=revision)).sha
    if commit is None:
        raise NetworkError(f"{printable(repo_id)}: the Hub does not say which commit it is")
    return commit


def _is_listed(repo_id: str, revision: str | None, to: Path | None) -> bool:
    """Whether the client knows all files of a commit. If not, it takes what it finds here for all of them."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        get_cached_repo_tree(repo_id, revision=revision, local_dir=to)
    except CachedRepoTreeNotFoundError:
        return False
    return True


def _remember(root: Path, name: str, commit: str) -> None:
    """Note in the cache by which name a commit was asked for, as the client does: offline it goes by that."""
    ref = root.parents[1] / "refs" / name
    with contextlib.suppress(OSError):  # the cache may be read-only
        if ref.exists() and ref.read_text() == commit:
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        part = ref.with_name(f"{ref.name}.{os.getpid()}")
        part.write_text(commit)
        os.replace(part, ref)


def folders(where: Place, commit: str | None, name: str) -> list[str]:
    """Return the folders below a place that hold a file `name`. Raises NetworkError."""
    found = (PurePosixPath(path) for path in files(where, commit))
    return [str(path.parent) for path in found if path.name == name]


def files(where: Place, commit: str | None) -> dict[str, int]:
    """Return the files below a place and their sizes in bytes. Raises NetworkError.

    They come from the list that `snapshot` has left in the cache, or else from the Hub.
    """
    from huggingface_hub import HfApi, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        with client():
            try:
                entries: Iterable[Any] = get_cached_repo_tree(where.repo_id, revision=commit)
            except CachedRepoTreeNotFoundError:
                entries = again(lambda: list(HfApi().list_repo_tree(where.repo_id, recursive=True, revision=commit)))
    except Exception as error:
        raise explain(error, str(where), revision=commit) from None
    start = where.inside("")
    return {
        entry.path.removeprefix(start): entry.size
        for entry in entries
        if hasattr(entry, "size") and entry.path.startswith(start)
    }

"""A repo of the Hub or a folder of one, what of it is fetched, and its cache."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import BadInputError, NetworkError, UsageError, printable
from ...progress import Advance
from .errors import explain
from .session import again, bar_that_tells, client, is_unreachable

__all__ = ["Place", "discard", "files", "folders", "is_hub_url", "is_offline", "snapshot"]

_NAME = r"[A-Za-z0-9][\w.-]*"
_PLACE = re.compile(rf"({_NAME}(?:/{_NAME})?)((?:/{_NAME})*)")
_SCHEME = "hf://"
_NO_MODELS = ("datasets", "spaces", "buckets")  # where the path of a URL begins so
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """A Hub repo, or a folder of one: `org/name`, or `org/name/path`."""

    repo_id: str
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Place:
        """Also of the address of its page, or of `hf://org/name`.

        Raises:
            BadInputError: it is not one.
            UsageError: the address is that of a revision, or of a file.
        """
        match = _PLACE.fullmatch(_address(text) if is_hub_url(text) else text.rstrip("/"))
        if match is None or (is_hub_url(text) and match[1].split("/")[0] in _NO_MODELS):
            raise BadInputError(f"{printable(text)}: no such folder, and not a Hub id such as org/name")
        return cls(match[1], match[2].lstrip("/"))

    def inside(self, name: str) -> str:
        """A file's path in the repo."""
        return f"{self.path}/{name}" if self.path else name

    def __str__(self) -> str:
        return f"{self.repo_id}/{self.path}" if self.path else self.repo_id


def is_hub_url(text: str) -> bool:
    """Whether a text is a URL of the Hub, and so says the same as a Hub id."""
    return text.startswith(_SCHEME) or (text.startswith("http") and text.startswith(_endpoints()))


def is_offline() -> bool:
    """Whether the user wants the Hub not to be asked: by what is in the cache alone."""
    from huggingface_hub import constants

    return constants.is_offline_mode()


def _endpoints() -> tuple[str, ...]:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT.rstrip('/')}/", "https://huggingface.co/", "https://hf.co/"


def _address(url: str) -> str:
    """The id in a URL of the Hub. Raises UsageError where it says more than a place."""
    start = next(start for start in (_SCHEME, *_endpoints()) if url.startswith(start))
    path = re.sub(r"[?#].*", "", url.removeprefix(start), flags=re.DOTALL).strip("/")
    path = re.sub(rf"^({_NAME}/{_NAME})/tree/main(?=/|$)", r"\1", path)
    further = re.match(rf"({_NAME}/{_NAME})(?:@|/(?:tree|blob|resolve|commit)/)", path)
    if further:
        raise UsageError(
            f"{printable(url)}: names a revision, or a file", hint=f"give {further[1]}, and a branch with --revision"
        )
    return path


def snapshot(
    where: Place,
    *,
    revision: str | None,
    patterns: Sequence[str],
    ignored: Sequence[str],
    to: Path | None,
    report: Advance | None = None,
) -> tuple[Path, str | None]:
    """The files at a place that match `patterns`, at one commit, fetched into `to` or the cache: (folder, commit).
    `report` is told of bytes that arrive; then the client shows no bars.

    Offline, or where the Hub does not answer, the commit that the cache knows by that name; a log tells the latter.

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
        if not _is_listed(where.repo_id, revision, to):  # there may be less than was asked for
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
    """The commit that a branch or tag is now."""
    from huggingface_hub import HfApi

    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    commit = again(lambda: HfApi().model_info(repo_id, revision=revision)).sha
    if commit is None:
        raise NetworkError(f"{printable(repo_id)}: the Hub does not say which commit it is")
    return commit


def _is_listed(repo_id: str, revision: str | None, to: Path | None) -> bool:
    """Whether the client knows all files of a commit. If not, it gives what it finds here of them for all."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        get_cached_repo_tree(repo_id, revision=revision, local_dir=to)
    except CachedRepoTreeNotFoundError:
        return False
    return True


def _remember(root: Path, name: str, commit: str) -> None:
    """Have the cache know by which name a commit was asked for, as the client does: offline it goes by that."""
    ref = root.parents[1] / "refs" / name
    with contextlib.suppress(OSError):  # a cache that is only read
        if ref.exists() and ref.read_text() == commit:
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        part = ref.with_name(f"{ref.name}.{os.getpid()}")
        part.write_text(commit)
        os.replace(part, ref)


def folders(where: Place, commit: str | None, name: str) -> list[str]:
    """The folders below a place that hold a file `name`. Raises NetworkError."""
    found = (PurePosixPath(path) for path in files(where, commit))
    return [str(path.parent) for path in found if path.name == name]


def files(where: Place, commit: str | None) -> dict[str, int]:
    """The files below a place and their sizes in bytes, by the listing that `snapshot` has left in the cache, if it
    could. Raises NetworkError."""
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


def discard(path: Path) -> None:
    """Remove a file of the cache and what it links to, so that it is fetched again."""
    while True:
        target = path.parent / path.readlink() if path.is_symlink() else None
        path.unlink(missing_ok=True)
        if target is None:
            return
        path = target

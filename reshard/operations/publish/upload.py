"""An upload to the Hub: one commit onto a known parent, and a comparison with what the Hub then holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from typing import Any

from ...errors import IntegrityError
from ...storage.hub.errors import doing
from ...storage.hub.session import again
from ...text import listed, printable

__all__ = ["Change", "LocalFile", "holds", "upload"]


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file as it was when its digests were checked."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def now(cls, path: Path) -> LocalFile:
        status = os.stat(path)
        return cls(path, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Change:
    """A commit to make onto `parent`, on the branch `revision` (None: the main one), created first if `new_branch`.

    The keys of `files` and `texts` are paths in the repo.
    """

    repo_id: str
    parent: str
    revision: str | None
    new_branch: bool
    files: Mapping[str, LocalFile]
    texts: Mapping[str, str]
    deleted: tuple[str, ...]
    message: str
    create_pr: bool


def upload(change: Change) -> tuple[str, str]:
    """Upload and commit. Returns the commit, and its page. Files that the Hub has already are not sent.

    Raises:
        IntegrityError: a file has changed meanwhile, or the Hub holds something else afterwards.
        NetworkError, RemoteMovedError: as `doing` raises them.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, repo_id = HfApi(), change.repo_id
    with doing("upload files", repo_id):
        large = [CommitOperationAdd(path, str(file.path)) for path, file in change.files.items()]
        small = [CommitOperationAdd(path, text.encode()) for path, text in change.texts.items()]
        base = None if change.new_branch else change.revision
        api.preupload_lfs_files(repo_id, [*large, *small], revision=base, create_pr=change.create_pr, free_memory=False)
    changed = [printable(file.path) for file in change.files.values() if LocalFile.now(file.path) != file]
    if changed:
        raise IntegrityError(f"changed while it was uploaded: {listed(changed)}")
    if change.new_branch:
        with doing(f"make the branch {printable(change.revision)}", repo_id):
            api.create_branch(repo_id, branch=str(change.revision), revision=change.parent, exist_ok=True)
    with doing("open a pull request" if change.create_pr else "commit", repo_id):
        done = api.create_commit(
            repo_id,
            [*large, *small, *(CommitOperationDelete(path, is_folder=False) for path in change.deleted)],
            commit_message=change.message,
            revision=change.revision,
            parent_commit=change.parent,
            create_pr=change.create_pr,
        )
    with doing("compare what it holds", repo_id):
        _compare(api, repo_id, done.oid, [*large, *small], change.deleted)
    return done.oid, done.pr_url or f"{api.endpoint}/{repo_id}/tree/{done.oid}"


def holds(entry: Any, addition: Any) -> bool:
    """Whether a file of a repo, as the Hub lists it (None: there is none), is the one to be added."""
    if entry is None or entry.size != addition.upload_info.size:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == addition.upload_info.sha256.hex())
    with addition.as_file() as file:
        content = file.read()
    return bool(entry.blob_id == sha1(b"blob %d\0%b" % (len(content), content)).hexdigest())


def _compare(api: Any, repo_id: str, commit: str, additions: list[Any], deleted: tuple[str, ...]) -> None:
    """Compare each file's size and digest with the Hub's for the commit. Raises IntegrityError."""
    tree = again(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=commit)))
    there = {entry.path: entry for entry in tree}
    wrong = [path for path in deleted if path in there]
    for addition in additions:
        if not holds(there.get(addition.path_in_repo), addition):
            wrong.append(addition.path_in_repo)
    if wrong:
        raise IntegrityError(
            f"{repo_id}: commit {commit} does not hold what was sent: {listed(wrong)}",
            hint="do not use it; run it again, or revert it on the Hub",
        )

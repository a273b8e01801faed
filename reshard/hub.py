"""The Hugging Face Hub, through huggingface_hub alone."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import BadInputError, NetworkError, ReshardError, printable
from .manifest import read_manifest
from .source import NOT_WANTED, SMALL_FILES, Source, is_resharded, open_source, weight_files

__all__ = ["fetch", "locate", "resolve_source"]

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def locate(
    place: str, *, revision: str | None = None, patterns: Sequence[str] = SMALL_FILES
) -> tuple[Path, str | None, str | None]:
    """A local folder, or the snapshot of a Hub repo pinned to one commit: (folder, repo id, commit).

    Of a repo, only the files that match `patterns` are fetched; those already in the cache are used from there.

    Raises:
        NetworkError: the Hub cannot be reached, or does not give it.
        BadInputError: `place` is neither a folder nor a Hub id.
    """
    path = Path(place)
    if path.exists():
        return path, None, None
    if not _REPO_ID.fullmatch(place):
        raise BadInputError(f"{printable(place)}: no such folder, and not a Hub id such as org/name")

    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = snapshot_download(
            place, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(NOT_WANTED)
        )
    except Exception as error:  # the client lets through whatever its transport and its parsers raise
        raise _explain(error, place, revision) from None
    return Path(folder), place, Path(folder).name


def _explain(error: Exception, place: str, revision: str | None) -> ReshardError:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = printable(place)
    if isinstance(error, HFValidationError):
        return BadInputError(f"{name}: {_first_line(error)}")
    if isinstance(error, GatedRepoError):
        return NetworkError(
            f"{name}: access is restricted", hint="ask for access on its page, and log in with: hf auth login"
        )
    if isinstance(error, RepositoryNotFoundError):
        return NetworkError(
            f"{name}: no such folder here, and no such repo on the Hub (or it is private)",
            hint="check the name; for a private repo log in with: hf auth login",
        )
    if isinstance(error, RevisionNotFoundError):
        return NetworkError(f"{name}: has no revision {printable(revision)}", hint="give a branch, tag or commit")
    if isinstance(error, LocalEntryNotFoundError):
        cause = f" ({_first_line(error.__cause__)})" if error.__cause__ else ""
        return NetworkError(
            f"{name}: no such folder here, and the Hub does not answer{cause}",
            hint="check the connection, or give a local folder",
        )
    return NetworkError(
        f"{name}: could not be fetched: {type(error).__name__}: {_first_line(error)}",
        hint="check the connection, and try again: what has arrived is kept",
    )


def _first_line(error: BaseException) -> str:
    return printable(next(iter(str(error).splitlines()), ""))


def fetch(place: str, *, revision: str | None = None) -> tuple[Path, str | None, str | None]:
    """`locate` a checkpoint, or a resharded one, with its weights: (folder, repo id, commit)."""
    root, repo_id, commit = locate(place, revision=revision)
    if repo_id is not None:
        weights = [file.name for file in read_manifest(root).files()] if is_resharded(root) else weight_files(root)
        locate(place, revision=commit, patterns=weights)
    return root, repo_id, commit


def resolve_source(place: str, *, revision: str | None = None) -> Source:
    """Open a checkpoint: a local folder, or a Hub id, of which just the files it needs are fetched into the cache."""
    root, repo_id, commit = fetch(place, revision=revision)
    return open_source(root, repo_id=repo_id, commit=commit)

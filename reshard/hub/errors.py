"""What the Hub's client raises, in our words: which right is missing, and whether trying again can help."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from ..errors import BadInputError, NetworkError, RemoteMovedError, ReshardError, StorageError, printable
from .session import BUSY, client

__all__ = ["doing", "explain"]

_OF_A_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
_OF_FILES = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


@contextlib.contextmanager
def doing(words: str, place: object) -> Iterator[None]:
    """What the client raises inside is raised as an error of ours, which says what could not be done."""
    try:
        with client():
            yield
    except Exception as error:  # the client lets through whatever its transport and its parsers raise
        raise explain(error, str(place), writing=words) from None


def explain(
    error: BaseException, place: str, *, revision: str | None = None, writing: str | None = None
) -> ReshardError:
    """The error to raise for one of the client's. `writing` says what was to be done to the repo, if it was that."""
    if isinstance(error, ReshardError):
        return error
    name = printable(place)
    if local := _said_by_disk(error):
        return StorageError(f"{name}: could not {writing or 'be kept here'}: {local}")
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return BadInputError(f"{name}: {_first_line(error)}")
    incomplete = isinstance(error, IncompleteSnapshotError)
    if isinstance(error, OfflineModeIsEnabled) or (
        isinstance(error, LocalEntryNotFoundError) and constants.is_offline_mode()
    ):
        if writing:
            return NetworkError(f"{name}: offline, as HF_HUB_OFFLINE says")
        here = "not all of it is in the cache" if incomplete else "no such folder here, not in the cache"
        return NetworkError(
            f"{name}: {here}, and offline", hint="unset HF_HUB_OFFLINE to fetch it, or give a local folder"
        )
    status = _status(error)
    if writing and (status in (401, 403) or isinstance(error, LocalTokenNotFoundError)):
        return _no_right(name, status, writing)
    if writing and status in (409, 412):
        return RemoteMovedError(
            f"{name}: somebody else has changed the repo meanwhile",
            hint="nothing was published; run it again: what has been uploaded is not sent again",
        )
    if isinstance(error, GatedRepoError):
        return NetworkError(
            f"{name}: access is restricted", hint="ask for access on its page, and log in with: hf auth login"
        )
    if isinstance(error, RepositoryNotFoundError):
        here = "" if writing else "no such folder here, and "
        return NetworkError(
            f"{name}: {here}no such repo on the Hub (or it is private)",
            hint="check the name; for a private repo log in with: hf auth login",
        )
    if isinstance(error, RevisionNotFoundError):
        return NetworkError(f"{name}: has no revision {printable(revision)}", hint="give a branch, tag or commit")
    if writing:
        return NetworkError(
            f"{name}: could not {writing}: {_kind(error, status)}",
            hint="check the connection, and run it again: what has been uploaded is not sent again",
        )
    if isinstance(error, LocalEntryNotFoundError):
        cause = f" ({_first_line(error.__cause__)})" if error.__cause__ else ""
        here = "not all of it is in the cache" if incomplete else "no such folder here"
        return NetworkError(
            f"{name}: {here}, and the Hub does not answer{cause}", hint="check the connection, or give a local folder"
        )
    return NetworkError(
        f"{name}: could not be fetched: {_kind(error, status)}",
        hint="check the connection, and try again: what has arrived is kept",
    )


def _said_by_disk(error: BaseException | None) -> str | None:
    """What went wrong with a file of this machine, if it was that."""
    while error is not None:
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            return f"{printable(error.filename)}: {error.strerror}"
        if isinstance(error, OSError) and error.errno in _OF_A_DISK:
            return error.strerror
        # hf_xet has only words; those of an answer are the Hub's.
        found = None if hasattr(error, "response") else re.search(r"\(os error ([0-9]{1,3})\)", str(error))
        if found and int(found[1]) in _OF_A_DISK | _OF_FILES:
            return os.strerror(int(found[1]))
        error = error.__cause__
    return None


def _no_right(name: str, status: int | None, writing: str) -> NetworkError:
    where = "https://huggingface.co/settings/tokens"
    if status == 403:
        return NetworkError(
            f"{name}: the token has not the right to {writing}", hint=f"it needs write access there: {where}"
        )
    return NetworkError(
        f"{name}: to {writing} needs a token", hint=f"make one with write access at {where}, then: hf auth login"
    )


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of an error, or of what it was raised for."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return int(response.status_code)
        error = error.__cause__
    return None


def _kind(error: BaseException, status: int | None) -> str:
    """An upload's own error only names the file: what it was raised for says why."""
    if status in BUSY:
        return f"the Hub is too busy (status {status})"
    said = [f"{type(each).__name__}: {_first_line(each)}" for each in (error, error.__cause__) if each is not None]
    return said[0] if len(set(said)) == 1 else f"{said[0]} ({said[1]})"


def _first_line(error: BaseException) -> str:
    return printable(next(iter(str(error).splitlines()), ""))

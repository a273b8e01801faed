"""Errors of the Hub's client, in our words: which right is missing, and whether trying again can help."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from typing import Any

from ...errors import BadInputError, NetworkError, RemoteMovedError, ReshardError, StorageError
from ...files.system import LOCAL
from ...text import printable
from .session import BUSY, answer_of, client, is_unreachable

__all__ = ["doing", "explain"]

_TOKENS = "https://huggingface.co/settings/tokens"
_OF_FILES = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


@contextlib.contextmanager
def doing(words: str, place: object) -> Iterator[None]:
    """Raise what the client raises inside as an error of ours, which says what could not be done."""
    try:
        with client():
            yield
    except Exception as error:  # the client lets through whatever its transport and its parsers raise
        raise explain(error, str(place), writing=words) from None


def explain(
    error: BaseException, place: str, *, revision: str | None = None, writing: str | None = None
) -> ReshardError:
    """Return the error to raise for one of the client's. `writing` says what was to be done to the repo."""
    if isinstance(error, ReshardError):
        return error
    name = printable(place)
    if local := _said_by_disk(error):
        return StorageError(f"{name}: could not {writing or 'be kept here'}: {local}")
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
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
    answer = answer_of(error)
    status = None if answer is None else int(answer.status_code)
    if writing and isinstance(error, LocalTokenNotFoundError):
        return _without_token(name, writing)
    if writing and status in (409, 412):
        return RemoteMovedError(
            f"{name}: somebody else has changed the repo meanwhile",
            hint="nothing was published; run it again: what has been uploaded is not sent again",
        )
    if status in (401, 403) and (refused := _refused(name, answer, writing)):
        return refused
    if isinstance(error, RepositoryNotFoundError):
        here = "" if writing else "no such folder here, and "
        private = "must be one that the token may see" if _has_token(answer) else "needs: hf auth login"
        return NetworkError(
            f"{name}: {here}no such repo on the Hub (or it is private)",
            hint=f"check the name; a private repo {private}",
        )
    if isinstance(error, RevisionNotFoundError):
        return NetworkError(f"{name}: has no revision {printable(revision)}", hint="give a branch, tag or commit")
    if isinstance(error, RemoteEntryNotFoundError):
        return BadInputError(f"{name}: the repo has no such file: {printable(answer.request.url.path)}")
    if isinstance(error, LocalEntryNotFoundError) and not writing and (status is None or status in BUSY):
        here = "not all of it is in the cache" if incomplete else "no such folder here"
        if status is not None:
            return NetworkError(
                f"{name}: {here}, and {_kind(error, status)}", hint="try again later, or give a local folder"
            )
        cause = f" ({_first_line(error.__cause__)})" if error.__cause__ else ""
        return NetworkError(
            f"{name}: {here}, and the Hub does not answer{cause}", hint="check the connection, or give a local folder"
        )
    if isinstance(error, LocalEntryNotFoundError):  # it only says that the file is not in the cache either
        error = error.__cause__ or error
    return NetworkError(
        f"{name}: could not {writing or 'be fetched'}: {_kind(error, status)}",
        hint=_what_helps(
            error, answer, "what has been uploaded is not sent again" if writing else "what has arrived is kept"
        ),
    )


def _said_by_disk(error: BaseException | None) -> str | None:
    """Return what went wrong with a file of this machine; None if something else did."""
    while error is not None:
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            return f"{printable(error.filename)}: {error.strerror}"
        if isinstance(error, OSError) and error.errno in LOCAL:
            return error.strerror
        # An error of hf_xet has only words; the words of an error with a response are the Hub's.
        found = None if hasattr(error, "response") else re.search(r"\(os error ([0-9]{1,3})\)", str(error))
        if found and int(found[1]) in LOCAL | _OF_FILES:
            return os.strerror(int(found[1]))
        error = error.__cause__
    return None


def _refused(name: str, answer: Any, writing: str | None) -> NetworkError | None:
    """Return the error if the Hub does not let in who asks, by what is known of the token; None for another failure."""
    said, code = answer.headers.get("x-error-message"), answer.headers.get("x-error-code")
    if not _of_the_hub(answer) or code == "RepoNotFound":
        return None
    why = f" ({printable(said)})" if said else ""
    if code == "GatedRepo":
        how = "with the account of the token" if _has_token(answer) else "and log in with: hf auth login"
        return NetworkError(f"{name}: access is restricted", hint=f"ask for access on its page, {how}")
    if said == "Access to this resource is disabled.":
        return NetworkError(f"{name}: the Hub has disabled it")
    if not _has_token(answer):
        return _without_token(name, writing)
    if answer.status_code == 401:
        helps = "correct HF_TOKEN, or unset it" if os.environ.get("HF_TOKEN") else "log in anew with: hf auth login"
        return NetworkError(f"{name}: the Hub does not take the token{why}", hint=helps)
    right = "write" if writing and answer.request.method not in ("GET", "HEAD") else "read"
    return NetworkError(
        f"{name}: the token has not the right to {writing or 'read it'}{why}",
        hint=f"it needs {right} access there: {_TOKENS}",
    )


def _without_token(name: str, writing: str | None) -> NetworkError:
    if writing is None:
        return NetworkError(f"{name}: the Hub asks for a token", hint="log in with: hf auth login")
    return NetworkError(
        f"{name}: to {writing} needs a token", hint=f"make one with write access at {_TOKENS}, then: hf auth login"
    )


def _has_token(answer: Any) -> bool:
    return answer is not None and "authorization" in answer.request.headers


def _of_the_hub(answer: Any) -> bool:
    """Whether an answer comes from the Hub itself, not from where it keeps large files."""
    from huggingface_hub import constants

    return str(answer.request.url).startswith(constants.ENDPOINT.rstrip("/") + "/")


def _what_helps(error: BaseException | None, answer: Any, kept: str) -> str | None:
    if answer is not None and answer.status_code in BUSY:
        return f"try again later: {kept}"
    if answer is not None and _of_the_hub(answer):  # the Hub has understood, and will say the same again
        return None
    while error is not None:
        if is_unreachable(error):
            return f"check the connection, and try again: {kept}"
        error = error.__cause__
    return f"try again: {kept}"


def _kind(error: BaseException, status: int | None) -> str:
    """Return what an error says, and its cause: an upload's own error only names the file, its cause says why."""
    if status in BUSY:
        return f"the Hub is too busy (status {status})"
    said = [f"{type(each).__name__}: {_first_line(each)}" for each in (error, error.__cause__) if each is not None]
    return said[0] if len(set(said)) == 1 else f"{said[0]} ({said[1]})"


def _first_line(error: BaseException) -> str:
    return printable(next(iter(str(error).splitlines()), ""))

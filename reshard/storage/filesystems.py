"""Differences between the file systems of fsspec: their errors, their lists, and how they identify a file's content."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from ..errors import BadInputError, NetworkError, ReshardError, StorageError, UsageError
from ..files.digest import digest_of
from ..files.system import LOCAL, by_errno
from ..text import printable

__all__ = ["check_ranges", "doing", "identified", "listed", "name_in"]

# The names of entries that change with a file's content have one of these: digests, versions, times of a change.
_TELLING = re.compile(
    r"etag|md5|sha\d*$|crc|digest|checksum|hash|^hex$|generation|version|modif|mtime|updated|created|date.?time|write.?time"
)
_NO_ANSWER = re.compile("Connect|Timeout|HTTPClient|Disconnect|Payload")  # in the error names of the kinds of store
_DONE = {"list": "listed", "read": "read", "write": "written to", "remove from": "removed from"}


@contextlib.contextmanager
def doing(what: str, url: str) -> Iterator[None]:
    """Raise what a file system raises inside as an error of ours, except FileExistsError."""
    try:
        yield
    except (ReshardError, FileExistsError):
        raise
    except Exception as error:  # each kind of store has errors of its own
        raise _explained(error, what, printable(url)) from None


def _explained(error: Exception, what: str, place: str) -> ReshardError:
    words = printable(next(iter(str(error).splitlines()), ""))
    if isinstance(error, ImportError):
        package = str(getattr(error.__cause__ or error, "name", None) or "").partition(".")[0]
        wanted = "'reshard[s3]'" if place.startswith(("s3:", "s3a:")) else printable(package)
        return UsageError(f"{place}: a package is missing: {words}", hint=f"pip install {wanted}" if wanted else None)
    if isinstance(error, NotImplementedError):
        return UsageError(f"{place}: a store of this kind cannot be {_DONE[what]}: {words}")
    if isinstance(error, FileNotFoundError):
        return BadInputError(f"{place}: no such folder, or a file of it has gone: {words}")
    if isinstance(error, ValueError) and "rotocol" in words:
        return UsageError(
            f"{place}: {words}", hint="give a folder, a Hub id such as org/name, or a URL that fsspec opens"
        )
    if isinstance(error, OSError) and error.errno in LOCAL - {errno.EIO}:  # s3fs raises EIO for what S3 refuses
        return by_errno(error, f"{place}: {error.strerror}", StorageError)
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return NetworkError(
            f"{place}: may not {what}: {words}",
            hint="the credentials are those of the environment, or of the store's own tools (for S3: AWS_PROFILE …)",
        )
    no_answer = isinstance(error, OSError) or _NO_ANSWER.search(type(error).__name__)
    return NetworkError(
        f"{place}: could not {what}: {type(error).__name__}: {words}",
        hint="check the connection, and try again" if no_answer else None,
    )


def listed(system: Any, root: str) -> list[dict[str, Any]]:
    """Return what is in a folder now; nothing if there is no such folder."""
    system.invalidate_cache()
    try:
        found: list[dict[str, Any]] = system.ls(root, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return found


def name_in(info: Mapping[str, Any]) -> str:
    """Return the name that a listed file or folder has in its folder."""
    return str(info["name"]).rstrip("/").rpartition("/")[2]


def identified(system: Any, info: Mapping[str, Any]) -> tuple[int, str]:
    """Return size and identity of a listed file. If the list lacks them (HTTP), the store is asked for the file.

    Raises UsageError if nothing would tell another content from this one.
    """
    if info.get("size") is None or not _telling(info):
        info = {**info, **system.info(info["name"])}
    if info.get("size") is None or not _telling(info):
        raise UsageError(
            f"{printable(info['name'])}: the store gives neither its size and time nor a digest",
            hint="a change of it would not be noticed: fetch it with the store's own tools",
        )
    return int(info["size"]), digest_of(repr((info["size"], _telling(info))).encode())


def _telling(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the entries that change with a file's content, not with a look at it; stores name them differently."""
    return sorted((key, str(value)) for key, value in info.items() if _TELLING.search(key.lower()) and value)


@lru_cache
def check_ranges(system: Any, path: str, size: int) -> None:
    """Check that a server sends parts of a file, before anything large is asked for. Raises UsageError.

    A server that ignores the range would send the whole file every time.
    """
    try:
        with system.open(path, block_size=1, size=size, cache_type="none") as file:
            file.seek(size - 1)
            file.read(1)
    except ValueError:
        raise UsageError(
            f"{printable(path)}: the server gives no part of it, only the whole",
            hint="fetch the files, and give the path of their folder",
        ) from None

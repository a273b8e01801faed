"""What the file systems of fsspec differ in: how they fail, list, and tell one content of a file from another."""

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

# In the names of what tells one content of a file from another: digests, versions, times of a change.
_TELLING = re.compile(
    r"etag|md5|sha\d*$|crc|digest|checksum|hash|^hex$|generation|version|modif|mtime|updated|created|date.?time|write.?time"
)
_NO_ANSWER = re.compile("Connect|Timeout|HTTPClient|Disconnect|Payload")  # names of errors, of each kind of store
_DONE = {"list": "listed", "read": "read", "write": "written to"}


@contextlib.contextmanager
def doing(what: str, url: str) -> Iterator[None]:
    """What a file system raises inside is raised as an error of ours, but that something exists."""
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
        return BadInputError(f"{place}: no such place, or a file of it has gone: {words}")
    if isinstance(error, ValueError) and "rotocol" in words:
        return UsageError(
            f"{place}: {words}", hint="give a folder, a Hub id such as org/name, or a URL that fsspec opens"
        )
    if isinstance(error, OSError) and error.errno in LOCAL - {errno.EIO}:  # which s3fs says of what S3 refuses
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
    """What is in a folder now; nothing where there is none."""
    system.invalidate_cache()
    try:
        found: list[dict[str, Any]] = system.ls(root, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return found


def name_in(info: Mapping[str, Any]) -> str:
    """The name of a listed file or folder in its folder."""
    return str(info["name"]).rstrip("/").rpartition("/")[2]


def identified(system: Any, info: Mapping[str, Any]) -> tuple[int, str]:
    """Size and identity of a file that was listed. Where a list does not tell them (of HTTP), the file is asked for.

    Raises UsageError where nothing would tell another content from this one.
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
    """What changes with a file's content, and not with a look at it: each kind of store has names of its own."""
    return sorted((key, str(value)) for key, value in info.items() if _TELLING.search(key.lower()) and value)


@lru_cache
def check_ranges(system: Any, path: str, size: int) -> None:
    """Before anything large is asked for: a server that ignores the range would send all of the file, every time."""
    try:
        with system.open(path, block_size=1, size=size, cache_type="none") as file:
            file.seek(size - 1)
            file.read(1)
    except ValueError:
        raise UsageError(
            f"{printable(path)}: the server gives no part of it, only the whole",
            hint="fetch the files, and give the path of their folder",
        ) from None

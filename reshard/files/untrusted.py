"""Names, links and JSON that nobody vouches for: none leads out of its folder, none takes memory without end."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import BadInputError, PolicyError
from ..text import printable
from .mistaken import FIRST_BYTES, mistaken
from .system import by_errno

__all__ = [
    "UnknownError",
    "check_plain_name",
    "check_plain_path",
    "count",
    "counts",
    "maybe",
    "one_of",
    "read_json",
    "refuse_error_text",
    "text",
    "texts",
    "vetted_path",
]

_JSON_LIMIT = 256 << 20  # bytes of JSON; in memory they take twenty times as many at worst


def check_plain_name(name: str, *, what: str) -> None:
    """Raise PolicyError if a name could lead out of the folder it is used in, or no file can have it."""
    if not _is_plain(name):
        raise PolicyError(f"{what}: {printable(name)} is not a plain file name")


def check_plain_path(path: str, *, what: str) -> None:
    """Raise PolicyError if a path, with "/" between its names, could lead out of the folder it is used in, or into a
    hidden one: git, for one, runs files in its own hidden folder."""
    names = path.split("/")
    if not all(map(_is_plain, names)) or any(name.startswith(".") for name in names[:-1]):
        raise PolicyError(f"{what}: {printable(path)} is not a plain file name")


def _is_plain(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half a character: JSON can spell it
        return False
    return name not in ("", ".", "..") and os.path.basename(name) == name and not {*name} & {"\0", "\\"}


def vetted_path(root: Path, name: str, *, what: str, into: Iterable[Path] = (), way_out: str | None = None) -> Path:
    """Return the real path of a regular file, given by its name or path inside `root`.

    A symbolic link is followed only inside `root`, inside a Hub cache, whose snapshots are links, and `into` the
    folders that the user names. `way_out` is the option that the hint names if another link leads out.

    Raises:
        PolicyError: the name or a link leaves the folder.
        BadInputError: there is no such file, or it is not a regular one.
        StorageError: the system does not let it be read.
    """
    check_plain_path(name, what=what)
    path = root / name
    try:
        real = Path(os.path.realpath(path, strict=True))
        mode = os.stat(real).st_mode
    except OSError as error:
        words = f"{what}: {printable(path)} cannot be read: {error.strerror}"
        raise by_errno(error, words, BadInputError) from None
    if not any(real.is_relative_to(folder) for folder in (*_inside(root), *map(_real, into))):
        hint = f"{way_out} {printable(real.parent)}" if way_out else None
        raise PolicyError(f"{what}: {printable(path)} is a link that leads out of the source folder", hint=hint)
    if not stat.S_ISREG(mode):
        raise BadInputError(f"{what}: {printable(path)} is not a regular file")
    return real


def _real(folder: Path) -> Path:
    return Path(os.path.realpath(folder))


def _inside(root: Path) -> tuple[Path, ...]:
    """Return the folders that links may lead into: `root`; or, if it is in the `models--…/snapshots` of a Hub cache,
    the repo's part of the cache, and the blobs that its repos share."""
    real = _real(root)
    for folder in real.parents:
        if folder.name == "snapshots" and re.match(r"(models|datasets|spaces)--", folder.parent.name):
            return folder.parent, folder.parent.parent / "blobs"
    return (real,)


def read_json(path: Path, *, limit: int = _JSON_LIMIT) -> Any:
    """Parse a JSON file that nobody vouches for: of `limit` bytes at most, without duplicate keys.

    Raises:
        BadInputError: not JSON, a key twice, nested too deeply, or absurdly large.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    name, data = printable(path), b""
    try:
        if os.stat(path).st_size > limit:
            raise BadInputError(f"{name}: larger than {limit >> 20} MiB")
        data = path.read_bytes()
        return json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if found := mistaken(data[:FIRST_BYTES], json=True):
            raise BadInputError(f"{name}: is {found[0]}", hint=found[1]) from None
        raise BadInputError(f"{name}: not valid JSON: {printable(error)}") from None
    except OSError as error:
        raise by_errno(error, f"{name}: cannot be read: {error.strerror}", BadInputError) from None


def refuse_error_text(content: Any, name: str) -> None:
    """Raise BadInputError for JSON that a server sends in place of the file it was asked for: `{"error": …}`."""
    fields = content if isinstance(content, dict) else {}
    said = fields.get("error", fields.get("message"))
    if isinstance(said, str):
        raise BadInputError(f"{name}: is an error message of a server ({printable(said, 80)})", hint="fetch it again")


_T = TypeVar("_T")


class UnknownError(ValueError):
    """A value that a newer release may have written, and knows. The message continues the name of the file."""


def text(value: Any) -> str:
    """Return `value`, a string. Raises ValueError, as all readers below do."""
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {value!r}")
    return value


def texts(value: Any) -> dict[str, str]:
    """Return `value`, an object whose values are strings."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {value!r}")
    return {key: text(item) for key, item in value.items()}


def count(value: Any) -> int:
    """Return `value`, an integer that is not negative."""
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a number of at least 0, got {value!r}")
    return value


def counts(value: Any) -> tuple[int, ...]:
    """Return `value`, a list of integers that are not negative, as a tuple."""
    return tuple(map(count, value))


def one_of(known: Collection[str], value: Any) -> str:
    """Return `value`, one of the `known` strings."""
    if text(value) not in known:
        raise ValueError(f"unknown {value!r}")
    return value


def maybe(read: Callable[[Any], _T], value: Any) -> _T | None:
    """Return `read(value)`, or None if `value` is None."""
    return None if value is None else read(value)

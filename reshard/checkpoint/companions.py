"""Companions: the files beside the weights that go along with a checkpoint, and why each of the others does not.

Names and sizes decide, and nothing is opened. A folder here, a repo of the Hub and a store are treated alike.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..errors import UsageError
from ..text import printable
from .kinds import CARD, KNOWN, KNOWN_AT_TOP, NEVER, OURS, PARTS, SILENT, WEIGHTS

__all__ = ["Item", "Left", "choose", "included", "left_report", "walk"]

FILE_LIMIT = 256 << 20  # bytes; the largest vocabularies have 60 MB
TOTAL_LIMIT = 1 << 30  # bytes
MOST_FILES = 1000
DEEPEST = 4  # folders
_MOST_LISTED = 20_000  # files looked at, of all folders together

_UNSHOWN = ("Cc", "Cf", "Zl", "Zp")  # control characters, marks that turn text around, ends of lines

UNKNOWN = "of no known kind: --include PATTERN takes it along"
_CASE = "differs only by case from another"
_DEEP = f"more than {DEEPEST} folders deep"
_MANY = f"more than {MOST_FILES} files"
_LARGE = f"larger than {FILE_LIMIT >> 20} MiB"
_TOTAL = f"more than {TOTAL_LIMIT >> 20} MiB together"
_UNSEEN = f"not looked at, behind {_MOST_LISTED:,} others"


@dataclass(frozen=True, slots=True)
class Item:
    """A file in a checkpoint's folder, or a folder in it that was not entered, with a "/" at the end.

    `path` is relative, with "/". `size` is in bytes, None if it is not known. `odd` says why it can be no companion
    whatever its name is: a link that leads out, a device.
    """

    path: str
    size: int | None = None
    odd: str = ""


@dataclass(frozen=True, slots=True)
class Left:
    """A file or folder ("/" at the end) that is left behind, why, and the files that name it and go along."""

    path: str
    why: str
    named_by: tuple[str, ...] = ()


def choose(
    items: Iterable[Item], *, include: Sequence[str] = (), read: Iterable[str] = ()
) -> tuple[tuple[str, ...], tuple[Left, ...]]:
    """Return the companions among the files of a folder, and the files that are left behind; both sorted by path.

    `include` are shell patterns of further paths; `*` stands for "/" too. `read` are the files that the source
    consists of: they are in neither result.

    Raises UsageError for a pattern that matches nothing.
    """
    items = tuple(items)
    patterns = included(include, [item.path for item in items])
    # If names differ only by case, transformers opens the one in lower case, so it comes first.
    ordered = sorted(items, key=lambda item: (item.path.count("/"), item.path != item.path.lower(), item.path))
    skipped = frozenset(read)
    found = [item for item in ordered if item.path not in skipped]
    parts = _parts(found)
    taken: dict[str, Item] = {}
    left: dict[str, str] = {}
    seen: dict[str, str] = {}
    total = 0
    for item in found:
        path, why = _never(item, parts)
        if why is None:
            continue
        if not why and not _is_known(path) and not any(fnmatchcase(path, pattern) for pattern in patterns):
            why = UNKNOWN
        why = why or _clash(path, seen) or _beyond(item, len(taken), total)
        if why:
            left.setdefault(path, why)
        else:
            taken[path] = item
            total += item.size or 0
            seen |= {_folded(prefix): prefix for prefix in _prefixes(path)}
    return tuple(sorted(taken)), tuple(Left(path, why) for path, why in sorted(left.items()))


def included(include: Sequence[str], paths: Iterable[str]) -> list[str]:
    """Return the patterns of further companions, ready for use. Raises UsageError for one that matches no path."""
    patterns, known = [pattern + "*" if pattern.endswith("/") else pattern for pattern in include], list(paths)
    for pattern, given in zip(patterns, include):
        if not any(fnmatchcase(path.rstrip("/"), pattern) for path in known):
            raise UsageError(
                f"--include {printable(given)}: matches no file",
                hint="a pattern is one of paths inside SOURCE, such as '*.yaml' or 'assets/*'",
            )
    return patterns


def _parts(items: Iterable[Item]) -> frozenset[str]:
    """Return the folders that hold weights or a resharded model themselves."""
    found = set()
    for item in items:
        folder, _, name = item.path.rpartition("/")
        if folder and name.lower() in PARTS:
            found.add(folder)
    return frozenset(found)


def _never(item: Item, parts: Set[str]) -> tuple[str, str | None]:
    """Return the path of a file, or of the first folder on the way to it that stays behind, and why it never goes
    along: "" if it may, None if it is passed over in silence."""
    steps = item.path.rstrip("/").split("/")
    for depth, step in enumerate(steps):
        is_folder = depth < len(steps) - 1 or item.path.endswith("/")
        path = "/".join(steps[: depth + 1])
        why = _by_name(step)
        if is_folder:
            why = PARTS.what if why == "" and path in parts else why
            why = _DEEP if why == "" and depth >= DEEPEST else why
        if why != "":
            return path + "/" * is_folder, why
    if item.odd or item.path.endswith("/"):
        return item.path, item.odd or _UNSEEN
    kinds = (OURS, CARD, WEIGHTS) if len(steps) == 1 else (WEIGHTS,)
    return item.path, next((kind.what for kind in kinds if steps[-1].lower() in kind), "")


def _by_name(step: str) -> str | None:
    """Say why a file or folder of this name never goes along: "" if it may, None as for `_never`."""
    name = step.lower()
    if name in SILENT:
        return None
    if not step.strip() or "\\" in step or any(unicodedata.category(c) in _UNSHOWN for c in step):
        return "a name that is not what it looks like"
    return next((kind.what for kind in NEVER if name in kind), "")


def _is_known(path: str) -> bool:
    name = path.rpartition("/")[2].lower()
    return any(name in kind for kind in KNOWN) or ("/" not in path and name in KNOWN_AT_TOP)


def _prefixes(path: str) -> Iterator[str]:
    steps = path.split("/")
    return ("/".join(steps[: depth + 1]) for depth in range(len(steps)))


def _folded(path: str) -> str:
    """Return a form that two names share if a disk that does not tell cases apart takes them for the same."""
    return unicodedata.normalize("NFKC", path).casefold()


def _clash(path: str, seen: Mapping[str, str]) -> str:
    same = all(seen.get(_folded(prefix), prefix) == prefix for prefix in _prefixes(path))
    return "" if same else _CASE


def _beyond(item: Item, count: int, total: int) -> str:
    size = item.size or 0
    if size > FILE_LIMIT:
        return _LARGE
    if count >= MOST_FILES:
        return _MANY
    return _TOTAL if total + size > TOTAL_LIMIT else ""


def walk(look: Callable[[str], tuple[Iterable[Item], Iterable[str]]]) -> Iterator[Item]:
    """Yield the files of a folder and of the folders in it, the nearest first, and the folders that are not entered.

    `look` returns the content of the folder of a path ("" for the first): items, and names of folders. A folder is not
    entered if nothing in it can go along, or after `_MOST_LISTED` files.
    """
    ahead, seen = [""], 0
    for folder in ahead:  # `ahead` grows meanwhile
        if seen >= _MOST_LISTED:
            yield Item(folder, odd=_UNSEEN)
            continue
        items, folders = look(folder)
        here = list(items)
        seen += len(here)
        yield from here
        if folder.rstrip("/") in _parts(here):  # the folders in it stay behind with it
            continue
        for name in sorted(folders):
            path = f"{folder}{name}/"
            if _never(Item(path + "LICENSE"), frozenset())[1] == "":  # a file of it could go along
                ahead.append(path)
            else:
                yield Item(path)


def left_report(left: Iterable[Left]) -> list[dict[str, Any]]:
    """List the files of a source that are left behind, and why, as dicts."""
    return [{"path": entry.path, "why": entry.why, "named_by": list(entry.named_by)} for entry in left]

"""Reading JSON that nobody vouches for: every value checked for its type. Each raises ValueError."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

__all__ = ["UnknownError", "count", "counts", "maybe", "one_of", "text", "texts"]

_T = TypeVar("_T")


class UnknownError(ValueError):
    """What a newer release may have written, and know. The message goes on from the name of the file."""


def text(value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {value!r}")
    return value


def texts(value: Any) -> dict[str, str]:
    """An object whose values are strings."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {value!r}")
    return {key: text(item) for key, item in value.items()}


def count(value: Any) -> int:
    """A whole number that is not negative."""
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a number of at least 0, got {value!r}")
    return value


def counts(value: Any) -> tuple[int, ...]:
    """A list of such numbers."""
    return tuple(map(count, value))


def one_of(known: Collection[str], value: Any) -> str:
    """One of the known strings."""
    if text(value) not in known:
        raise ValueError(f"unknown {value!r}")
    return value


def maybe(read: Callable[[Any], _T], value: Any) -> _T | None:
    """What `read` makes of it, or None where it is null."""
    return None if value is None else read(value)

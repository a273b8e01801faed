"""Text that is safe to show: names from files that nobody vouches for, and URLs without their secrets."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .errors import ReshardError

__all__ = ["listed", "numbers_in_runs", "printable", "without_secrets"]


_SECRETS = (
    re.compile(r"(?<=://)[^/@\s]*@"),  # name and password
    re.compile(r"(?<=[?&])([\w.-]*(?:sig|token|key|secret|pass|credential|auth|x-amz-)[\w.-]*=)[^&#\s'\"<>)]+", re.I),
)


def without_secrets(text: str) -> str:
    """Remove the secrets of URLs in `text`: a name and password, and the values of query keys that sound secret."""
    named, signed = _SECRETS
    return signed.sub(r"\1…", named.sub("", text)) if "://" in text else text


def printable(text: object, limit: int = 200) -> str:
    """Make `text` safe to show: control, bidi and unprintable characters escaped, at most `limit` characters, and URLs
    `without_secrets`. A `ReshardError` is shown without its hint.

    Names of files and tensors come from files that nobody vouches for.
    """
    # Cut first: a crafted name can have 99 MB.
    bare = without_secrets((text.message if isinstance(text, ReshardError) else str(text))[: limit + 1])
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in bare)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def listed(names: Iterable[str], *, most: int = 5) -> str:
    """Join the first of many names, safe to show, and say how many more there are."""
    found = list(names)
    return ", ".join(map(printable, found[:most])) + (f" and {len(found) - most} more" if len(found) > most else "")


def numbers_in_runs(numbers: Iterable[int]) -> str:
    """Join ascending numbers, and write a run of three or more by its ends: 1–8, 16."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)

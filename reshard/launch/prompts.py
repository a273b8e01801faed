"""A file of prompts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ..errors import BadInputError
from ..files.system import by_errno
from ..text import printable

__all__ = ["STDIN", "decoded", "prompt_lines"]

STDIN = "-"


def prompt_lines(file: str) -> list[str]:
    """Return the lines of a file in UTF-8, or of stdin if it is `-`, without the empty ones.

    Raises BadInputError if the file cannot be read, or has no such line.
    """
    try:
        text = sys.stdin.buffer.read() if file == STDIN else Path(file).read_bytes()
    except OSError as error:
        raise by_errno(error, f"{printable(file)}: {error.strerror}", BadInputError) from None
    found = [line for line in re.split(r"\r?\n", decoded(text, file)) if line.strip()]
    if not found:
        raise BadInputError(f"{printable(file)}: holds no prompts", hint="one prompt a line")
    return found


def decoded(text: bytes, file: str) -> str:
    """Decode the text of a file, without a byte order mark. Raises BadInputError if it is not UTF-8."""
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadInputError(f"{printable(file)}: is not UTF-8") from None

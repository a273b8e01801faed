"""Contents that are not what a file's name promises, told by the first bytes, so that an error names the cause."""

from __future__ import annotations

import re

from ..text import printable

__all__ = ["FIRST_BYTES", "mistaken"]

FIRST_BYTES = 512  # enough to tell

_FETCH = "fetch it again"
# The beginning of a file, what the file is then, and what can be done. A safetensors file begins with the length of its
# header. The first eight bytes of each kind here, read as that length, are 0 or more than any header may have.
_KINDS: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
    (
        re.compile(rb"version https://git-lfs\.github\.com/"),
        "a git-lfs pointer, not the file itself",
        "fetch the file it stands for: git lfs pull, or hf download",
    ),
    (re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|head|body)", re.I), "a web page (HTML)", _FETCH),
    (
        re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:\?xml|Error>)", re.I),
        "a text in XML, as servers send for an error",
        _FETCH,
    ),
    (
        re.compile(rb"PK\x03\x04"),
        "a zip archive, as torch.save writes pickles",
        "load and save it once with transformers to get safetensors files",
    ),
    (
        re.compile(rb"\x80[\x02-\x05][}(c\x8a\x95]"),
        "a pickle",
        "load and save it once with transformers to get safetensors files",
    ),
    (re.compile(rb"GGUF"), "a GGUF file", "give the checkpoint that it was made from, in safetensors files"),
    (re.compile(rb"\x00{64}"), "nothing but zeros at its beginning, as an interrupted download leaves", _FETCH),
)
_JSON = re.compile(rb"(?:\xef\xbb\xbf)?\s*[{\[]\s*[\"{\[\]}]")


def mistaken(first: bytes, *, json: bool = False) -> tuple[str, str] | None:
    """Tell what a file is by its `first` bytes (up to FIRST_BYTES), and what can be done; None if that is not known.

    With `json` the file should be a text in JSON; without it, a text in JSON is told too.
    """
    if not first:
        return "empty", _FETCH
    for pattern, what, hint in _KINDS:
        if pattern.match(first):
            return what, hint
    if not json and _JSON.match(first):
        return f"a text in JSON ({printable(first[:80].decode(errors='replace'), 80)})", _FETCH
    return None

"""What a file holds in place of what its name promises, by its first bytes: so that an error names the cause."""

from __future__ import annotations

import re

from ..text import printable

__all__ = ["FIRST_BYTES", "mistaken"]

FIRST_BYTES = 512  # enough to tell

_FETCH = "fetch it again"
# What a file begins with, what it is then, and what can be done. A safetensors file begins with the length of its
# header: these eight bytes, taken for one, are longer than any header may be.
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
    """What a file is whose first bytes are `first`, and what can be done; None where nothing is known of it.

    `first` holds up to FIRST_BYTES. With `json` that is what the file should be, else a text in JSON is told too.
    """
    if not first:
        return "empty", _FETCH
    for pattern, what, hint in _KINDS:
        if pattern.match(first):
            return what, hint
    if not json and _JSON.match(first):
        return f"a text in JSON ({printable(first[:80].decode(errors='replace'), 80)})", _FETCH
    return None

"""Names of modules as plans write them, and of the style that says how many heads a module has."""

from __future__ import annotations

import re

__all__ = ["HEADS", "wildcard"]

HEADS = "heads"  # heads[query heads, KV heads, attributes that count them …]


def wildcard(name: str) -> str:
    """Replace layer numbers by `*`, as plans are written (transformers' `replace_layer_number_by_wildcard`)."""
    return re.sub(r"\.\d+(\.|$)", lambda match: ".*" + match.group(1), name)

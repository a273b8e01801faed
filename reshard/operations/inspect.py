"""What is in a resharded folder or repo, from its manifest alone."""

from __future__ import annotations

from pathlib import Path

from ..resharded.manifest import Manifest
from ..storage.locate import find_resharded
from ..storage.stores import as_text
from .arguments import checked

__all__ = ["inspect"]


@checked
def inspect(place: str | Path, *, revision: str | None = None) -> Manifest:
    """The manifest of a resharded folder, or of a Hub repo (only that file is fetched). Raises a `ReshardError`."""
    return find_resharded(as_text(place), revision=revision).manifest

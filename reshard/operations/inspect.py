"""The contents of a resharded folder or repo, from its manifest alone."""

from __future__ import annotations

from pathlib import Path

from ..resharded.manifest import Manifest
from ..storage.locate import find_resharded
from ..storage.stores import as_text
from .arguments import checked

__all__ = ["inspect"]


@checked
def inspect(place: str | Path, *, revision: str | None = None) -> Manifest:
    """Return the manifest of a resharded folder, Hub repo or URL. No other file is fetched. Raises a `ReshardError`."""
    return find_resharded(as_text(place), revision=revision).manifest

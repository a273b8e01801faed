"""What is in a resharded folder or repo, from its manifest alone."""

from __future__ import annotations

from pathlib import Path

from .hub import locate
from .manifest import Manifest, read_manifest
from .source import MANIFEST_NAME

__all__ = ["inspect"]


def inspect(place: str | Path, *, revision: str | None = None) -> Manifest:
    """The manifest of a resharded folder, or of a Hub repo (only that file is fetched). Raises a `ReshardError`."""
    folder, _, _ = locate(str(place), revision=revision, patterns=[MANIFEST_NAME])
    return read_manifest(folder)

"""What is in a resharded folder or repo, from its manifest alone."""

from __future__ import annotations

from pathlib import Path

from .errors import BadInputError, printable
from .hub import locate
from .manifest import Manifest, read_manifest
from .source import MANIFEST_NAME

__all__ = ["inspect"]


def inspect(place: str | Path, *, revision: str | None = None) -> Manifest:
    """The manifest of a resharded folder, or of a Hub repo (only that file is fetched). Raises a `ReshardError`."""
    folder, repo_id, _ = locate(str(place), revision=revision, patterns=[MANIFEST_NAME])
    if repo_id is not None and not (folder / MANIFEST_NAME).exists():
        raise BadInputError(f"{printable(place)}: the repo holds no {MANIFEST_NAME}, so it is not a resharded one")
    return read_manifest(folder)

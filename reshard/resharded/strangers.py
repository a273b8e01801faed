"""The files that a resharded folder lacks, and those in it that its manifest does not list."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path, PurePosixPath

from ..checkpoint.source import MANIFEST_NAME
from ..errors import IntegrityError
from ..files.system import by_errno, walked
from ..text import printable
from .manifest import Manifest

__all__ = ["missing_and_strange"]


def missing_and_strange(folder: Path, manifest: Manifest) -> tuple[list[str], list[str]]:
    """Return the paths of listed files that are missing, and of files and folders there that are not listed.

    Hidden ones are ignored, since tools leave them, except safetensors files. Raises a ReshardError if a folder cannot
    be listed.
    """
    known = {record.name for record in manifest.files()} | {MANIFEST_NAME}
    present, foreign = _present(folder, {str(parent) for name in known for parent in PurePosixPath(name).parents})
    strange = [
        name
        for name in sorted((present - known) | foreign)
        if name.endswith(".safetensors") or not PurePosixPath(name).name.startswith(".")
    ]
    return sorted(known - present), strange


def _present(folder: Path, folders: Set[str]) -> tuple[set[str], set[str]]:
    """Return, by path, the files of a folder and of its `folders`, and the other folders that are in these."""
    files, foreign = set(), set()
    try:
        for inside, below, names in walked(folder):
            at = Path(inside).relative_to(folder)
            files |= {str(at / name) for name in names}
            foreign |= {str(at / name) for name in below if str(at / name) not in folders}
            below[:] = [name for name in below if str(at / name) in folders]
    except OSError as error:
        words = f"{printable(error.filename or folder)}: {error.strerror}"
        raise by_errno(error, words, IntegrityError) from None
    return files, foreign

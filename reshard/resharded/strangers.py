"""What is in a resharded folder besides what its manifest lists."""

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
    """The files, by path, that the manifest lists and the folder lacks; and files and folders that are there and are
    not listed. Hidden ones are none: tools leave them. Raises a ReshardError where one cannot be listed."""
    known = {record.name for record in manifest.files()} | {MANIFEST_NAME}
    present, foreign = _present(folder, {str(parent) for name in known for parent in PurePosixPath(name).parents})
    strange = [
        name
        for name in sorted((present - known) | foreign)
        if name.endswith(".safetensors") or not PurePosixPath(name).name.startswith(".")
    ]
    return sorted(known - present), strange


def _present(folder: Path, folders: Set[str]) -> tuple[set[str], set[str]]:
    """The files of a folder and of the `folders` in it, by path; and the folders there that are none of those."""
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

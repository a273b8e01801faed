"""Where the parts of a conversion are gathered until it is finished: beside OUT on a disk, or in OUT in a store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ...errors import DestinationExistsError, UsageError
from ...process import Advance, Progress
from ...resharded.manifest import Manifest
from ...resharded.rank_file import FileRecord
from ...storage.hub.address import is_hub_url
from ...storage.stores import as_text, is_url
from ...text import printable
from ..destination import Destination
from .in_store import InStore
from .on_disk import OnDisk
from .record import PartRecord
from .share import Part

__all__ = ["Gathering", "gathering"]


class Gathering(Protocol):
    """The parts of one destination. Any call raises a ReshardError if it fails."""

    @property
    def place(self) -> str:
        """The destination, as it is printed."""

    @property
    def name(self) -> str:
        """Where the parts are, as it is printed."""

    @property
    def is_read_again(self) -> bool:
        """Whether the files are on this machine when they are together, so that source files are given back."""

    def stage(self, part: Part) -> Destination:
        """Return the destination of a part's folder, which must hold its record and draft."""

    def records(self) -> dict[Part, PartRecord]:
        """Return the record of every part that is done."""

    def draft(self, part: Part) -> Manifest:
        """Return the draft of the manifest that a part has."""

    def lacks(self, record: PartRecord) -> list[str]:
        """Return the files of a part that are missing, or of another size."""

    def forget(self, part: Part) -> None:
        """Remove what is there of a part, so that it can be made anew."""

    def whole(self) -> Manifest | None:
        """Return the manifest at the destination, None if nothing is there. Raises DestinationExistsError if what is
        there is no resharded folder."""

    def together(self, records: Sequence[PartRecord]) -> Path | None:
        """Bring the files of all parts together. Returns the folder that has them, if it is on this machine."""

    def at(self, part: Part) -> str:
        """Return where the record of a part is, as it is printed."""

    def check(self, record: FileRecord, report: Advance, *, whole: bool = False) -> None:
        """Read a file again that is together with the others, or in the `whole` folder. Raises IntegrityError if it is
        not as it was written."""

    def complete(self, manifest: Manifest) -> None:
        """Write the manifest, which makes the destination whole."""

    def clear(self) -> None:
        """Remove what the parts have left."""

    def clear_on(self) -> None:
        """Go on with a removal that was interrupted."""


def gathering(out: str | Path, *, sync: bool = True, progress: Progress) -> Gathering:
    """Return where the parts of `out` are gathered: a path, or the URL of a store. Raises UsageError for the Hub."""
    out = as_text(out)
    if is_hub_url(out):
        raise UsageError(
            f"{printable(out)}: is on the Hub", hint="choose a folder, and put that there with: reshard publish"
        )
    if is_url(out):
        return InStore(out.rstrip("/"), progress)
    path = Path(os.path.abspath(out))
    if not path.name:
        raise DestinationExistsError(f"{printable(path)}: already exists", hint="choose another name")
    return OnDisk(path, sync)

"""Where a conversion reads from: a checkpoint that is here, one that a resharded folder was made of, or one to come."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .arrivals import AHEAD, Arrivals
from .digest import DigestsAhead
from .hub import fetch, locate
from .reader import equal_tensors
from .remote import Remote, open_remote
from .resharded import Resharded, open_resharded
from .source import Source, is_resharded, open_source

__all__ = ["Origin", "open_origin"]


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint that is planned, and what there is of it: its files, or else a resharded folder that was `made`
    of it, or files that are still to come from a `remote` place."""

    source: Source
    made: Resharded | None = None
    remote: Remote | None = None

    @property
    def held(self) -> Source:
        """What is read."""
        return self.made.held if self.made else self.source

    def ahead(self) -> DigestsAhead:
        """Digests of the files that are here as the source has them."""
        here = () if self.made or self.remote else self.source.files
        return DigestsAhead({file.name: file.path for file in here})

    def equal(self, arrivals: Arrivals | None) -> Callable[[str, str], bool] | None:
        """How to tell whether two tensors hold the same bytes. None for a remote one none of whose files arrive."""
        if self.made:
            return self.made.equal
        return partial(equal_tensors, self.source, arrivals=arrivals) if arrivals or not self.remote else None

    def staged_bytes(self) -> int:
        """What files that are still to come take at once, beside what is made of them."""
        if self.remote is None:
            return 0
        coming = [file.size for file in self.source.files if file.name not in self.remote.cached]
        return sum(sorted(coming)[-AHEAD:])

    @contextlib.contextmanager
    def arrivals(self, folder: Path | None, *, at_once: bool) -> Iterator[Arrivals | None]:
        """The files that are still to come, if any, each in `folder` for as long as it is needed; without a folder,
        they stay in the cache. With `at_once` the first begin to come before it is known which are needed."""
        if self.remote is None:
            yield None
            return
        remote = self.remote

        def discard(path: Path) -> None:
            if folder is not None and path.is_relative_to(folder):
                path.unlink(missing_ok=True)

        with Arrivals(partial(remote.fetch, folder=folder), discard=discard) as arrivals:
            if at_once:
                arrivals.expect(dict.fromkeys((file.name for file in self.source.files), 1))
            yield arrivals
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def open_origin(place: str, *, revision: str | None = None) -> Origin:
    """A checkpoint folder, a resharded one, or a Hub id of either. Raises a `ReshardError`."""
    root, repo_id, commit = locate(place, revision=revision)
    if is_resharded(root):
        if commit is not None:
            root, _, _ = fetch(place, revision=commit)
        made = open_resharded(root)
        return Origin(made.source, made=made)
    if repo_id is None or commit is None:
        return Origin(open_source(root))
    remote = open_remote(root, repo_id, commit)
    return Origin(remote.source, remote=remote)

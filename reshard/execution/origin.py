"""The origin of a conversion: a checkpoint that is here, one that a resharded folder was made from, or one to come."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..checkpoint.companions import included
from ..checkpoint.source import Source, SourceFile, is_resharded, open_source
from ..checkpoint.weights import AS_FOUND, Choice
from ..errors import StorageError, UsageError
from ..files.digest import DigestsAhead
from ..resharded.as_source import Resharded, open_resharded
from ..resharded.derived import Derived
from ..resharded.manifest import read_manifest
from ..storage.locate import away, look_at, of_hub
from ..storage.prefetch import AHEAD, Arrivals
from ..storage.remote import GivenUp, Remote, Spans, headers_of_absent, open_remote, remote_files
from ..text import printable
from .reader import equal_tensors
from .staging import Stage

__all__ = ["Origin", "Spans", "open_origin"]

_FETCHED = "fetched-"  # followed by the version: files of another version are not used


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint that is planned, and what there is of it: its files, or a resharded folder `made` from it.

    If there is a `remote` place, files of either are still to come from there. If `source` is `derived`, it is computed
    from the checkpoint that is there.
    """

    source: Source
    made: Resharded | None = None
    remote: Remote | None = None
    derived: Derived | None = None

    @property
    def original(self) -> Source:
        """The checkpoint that is there, or that a resharded folder was made from."""
        return self.derived.original if self.derived else self.source

    @property
    def held(self) -> Source:
        """The files that are read: those of the resharded folder, or of the checkpoint that is there."""
        return self.made.held if self.made else self.original

    def as_derived(self, derived: Derived) -> Origin:
        """Return the origin whose source is `derived` from this one's. Raises BadInputError if a resharded folder lacks
        what it is computed from."""
        filled = derived.filled(self.made.relocated_tensor) if self.made else derived
        return replace(self, source=derived.source, derived=filled)

    @property
    def version(self) -> str:
        """The version of the files that are still to come; empty if there is no remote place."""
        return self.remote.away.version if self.remote else ""

    def ahead(self) -> DigestsAhead:
        """Return digests, made ahead, of the files that are here as the source has them."""
        here = () if self.made or self.remote else self.original.files  # rank files are checked by tensor instead
        return DigestsAhead({file.name: file.path for file in here})

    def equal(self, arrivals: Arrivals | None) -> Callable[[str, str], bool] | None:
        """Return a test whether two tensors hold the same bytes; None if the source is remote and no files arrive."""
        if self.made:
            return self.made.equal
        return partial(equal_tensors, self.original, arrivals=arrivals) if arrivals or not self.remote else None

    def coming(self) -> list[SourceFile]:
        """Return the files that are still to come, in order."""
        return [file for file in self.held.files if self.remote and file.name not in self.remote.cached]

    def staged_bytes(self) -> int:
        """Return the bytes that files still to come take at once, beside the output.

        If the source is a resharded folder, all its rank files can be needed together.
        """
        sizes = sorted(file.size for file in self.coming())
        return sum(sizes if self.made else sizes[-AHEAD:])

    def staged(self, stage: Stage) -> Path:
        """Return the folder that has the fetched files meanwhile."""
        return stage.beside(_FETCHED + self.version)

    @contextlib.contextmanager
    def arrivals(
        self, stage: Stage, *, keep_cache: bool, at_once: bool = True, spans: Spans | None = None
    ) -> Iterator[Arrivals | None]:
        """Give the files that are still to come, if any.

        Each is beside the output for as long as it is needed, or else in the cache. If no earlier run left anything,
        the first files are under way `at_once`. What has come stays for the next run if the work has begun. Of a file
        that is among the `spans` when it is fetched, only those bytes come.
        """
        if self.remote is None:
            yield None
            return
        folder = None if keep_cache else self.staged(stage)

        def discard(path: Path) -> None:
            if path.is_relative_to(self.staged(stage)):
                path.unlink(missing_ok=True)

        remote, done = self.remote, False

        def fetch(name: str, given_up: GivenUp) -> Path:
            if spans and name in spans:
                return remote.fetch_spans(name, spans[name], given_up, folder=self.staged(stage))
            return remote.fetch(name, given_up, folder=folder)

        try:
            with Arrivals(fetch, discard=discard) as arrivals:
                if stage.fresh and at_once:
                    arrivals.expect({file.name: 1 for file in self.coming()[:AHEAD]})
                yield arrivals
            done = True
        except StorageError:  # do not leave a full disk fuller
            done = not stage.begun
            raise
        finally:
            if done or stage.folder is None:
                stage.clear(_FETCHED)


def open_origin(
    place: str, *, revision: str | None = None, choice: Choice = AS_FOUND, include: Sequence[str] = ()
) -> Origin:
    """Open a checkpoint folder, a resharded folder, or a Hub id or URL of either. Raises a `ReshardError`.

    `include` are patterns of files that are to go along too; from a resharded folder, all do.
    """
    root, found, version, items = look_at(place, revision=revision, choice=choice, include=include)
    if is_resharded(root):
        if choice != AS_FOUND:
            raise UsageError(
                f"{printable(place)}: is resharded: its manifest says where its weights are",
                hint="leave out --weights and --links-into",
            )
        included(include, [extra.name for extra in read_manifest(root).extras])
    if found is None or version is None:
        if not is_resharded(root):
            return Origin(open_source(root, choice=choice, include=include))
        made = open_resharded(root)
        return Origin(made.source, made=made)
    files = away(found, version)
    if is_resharded(root):
        made = open_resharded(root, absent=partial(headers_of_absent, root, files))
        return Origin(made.source, made=made, remote=remote_files(made.held, files))
    repo_id, commit = of_hub(found, version)
    remote = open_remote(root, files, items, choice=choice, repo_id=repo_id, commit=commit, include=include)
    return Origin(remote.source, remote=remote)

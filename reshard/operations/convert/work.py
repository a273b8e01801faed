"""The work of a conversion, whole or a part: its source is opened and planned, then files are written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._version import __version__
from ...checkpoint.left_behind import refuse_keys
from ...checkpoint.weights import Choice
from ...execution.earlier import Earlier
from ...execution.executor import Inputs, write_files
from ...execution.journal import Journal
from ...execution.origin import Origin, Spans, open_origin
from ...execution.staging import Stage
from ...files.digest import ALGORITHM, DigestsAhead, digest_file, digest_of, new_digest
from ...files.untrusted import vetted_path
from ...planning.model.rules import AUTO
from ...planning.recut import Recut, recut
from ...process import Progress
from ...resharded.as_source import UNKNOWN, recorded
from ...resharded.derived import CONFIG_NAME
from ...resharded.layout import FileLayout
from ...resharded.manifest import REFERENCE_NAME, Manifest
from ...resharded.rank_file import FileRecord
from ...sharding.topology import Topology
from ...storage.disk import check_free_space, copy_file, write_file
from ...storage.locate import fetch
from ...storage.prefetch import Arrivals
from ...strategies.registry import ParallelInterface
from ..values.change import Change, derived_origin, given_back

if TYPE_CHECKING:
    from ...checkpoint.source import SourceFile
    from ...planning.plan import ReshardPlan

__all__ = ["Asked", "Work", "completed", "prepared"]

_MANIFEST_SHARE = 1 << 20  # bytes kept free for the manifest and the folder itself


@dataclass(frozen=True, slots=True)
class Asked:
    """What to cut, and how: arguments of `plan`, checked. With a manifest that it is to be `like`, its styles."""

    source: str
    topology: Topology
    choice: Choice
    change: Change
    revision: str | None
    include: Sequence[str]
    tp_plan: Mapping[str, str] | str | Path
    strategies: ParallelInterface | str | Path
    dtype: str | None
    drop_unused: bool
    like: Manifest | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """A conversion that is planned, while its source files are open to it.

    `draft` is the manifest that is to be written, less what only the writing tells. `layouts` are all the files,
    though those of ranks that are not wanted cannot be filled.
    `spans` are the bytes of source files to come that are wanted: whole files, unless it names them.
    """

    origin: Origin
    draft: Manifest
    layouts: list[FileLayout]
    ahead: DigestsAhead
    arrivals: Arrivals | None
    spans: Spans
    keep_cache: bool

    @property
    def inputs(self) -> Inputs:
        """What the files are made of."""
        made, derived = self.origin.made, self.origin.derived
        records, computed = made.records if made else None, derived.computed if derived else {}
        return Inputs(self.origin.held, self.ahead, self.arrivals, records, computed)

    def digests(self) -> dict[str, str]:
        """Return what the files depend on: the files read, as they are now, and where elements go. One digest each."""
        origin = self.origin
        files = origin.held.files
        plan: list[object] = [origin.derived.digest() if origin.derived else None, *origin.source.extras]
        plan += [*self.draft.parameters, *((layout.name, layout.head) for layout in self.layouts)]
        # A version says more than the time of a copy in the cache.
        times = [] if origin.version else [file.mtime_ns for file in files]
        found: dict[str, Iterable[object]] = {
            "source": [(origin.version, origin.source.repo_id, origin.source.commit)],
            "list of source files": [(file.name, file.size, file.header.raw) for file in files],
            "state of the source files": times,
            "plan": plan,
        }
        return {name: _digest(things) for name, things in found.items()}

    def small_files(self) -> dict[str, str]:
        """Return the digests of the small files of the source that go along with the weights."""
        return {name: digest_file(self._small(name)) for name in self._kept()}

    def _kept(self) -> list[str]:
        origin = self.origin
        made, derived = origin.made, origin.derived
        same = derived is None and (made is None or made.manifest.dtype == self.draft.dtype)
        kept = [name for name in origin.source.extras if name != REFERENCE_NAME or same]
        return [name for name in kept if derived is None or name != CONFIG_NAME]

    def _small(self, name: str) -> Path:
        return vetted_path(self.origin.source.root, name, what="source")

    def write(
        self,
        stage: Stage,
        folder: Path,
        layouts: Sequence[FileLayout],
        *,
        digested: Collection[str] | None = None,
        extras: bool = True,
        earlier: Earlier | None = None,
        workers: int | None,
        sync: bool,
        progress: Progress,
    ) -> tuple[list[FileRecord], dict[str, str]]:
        """Write the files of these layouts, as `write_files` does, if there is room for them and for the `extras`."""
        origin, total = self.origin, sum(layout.size for layout in layouts)
        beside = sum((origin.source.root / name).stat().st_size for name in origin.source.extras) if extras else 0
        staged = 0 if self.keep_cache else origin.staged_bytes()
        check_free_space(folder, total + staged + beside + _MANIFEST_SHARE, origin.staged(stage))
        inputs = replace(self.inputs, digested=digested, earlier=earlier)
        with progress(total, "writing") as report, contextlib.closing(Journal(folder)) as journal:
            return write_files(folder, layouts, inputs, journal=journal, workers=workers, sync=sync, progress=report)

    def copy_extras(self, folder: Path, *, sync: bool) -> list[FileRecord]:
        """Write the small files that go along with the weights. Returns their records."""
        derived = self.origin.derived
        extras = [copy_file(self._small(name), folder, name, sync=sync) for name in self._kept()]
        if derived:
            write_file(folder / CONFIG_NAME, derived.config, sync=sync)
            extras.append(FileRecord(CONFIG_NAME, len(derived.config), digest_of(derived.config), {}))
        return extras


def _digest(things: Iterable[object]) -> str:
    digest = new_digest()
    for thing in things:
        digest.update(repr(thing).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def prepared(
    asked: Asked,
    stage: Stage,
    *,
    keep_cache: bool,
    ranks: Container[int] | None = None,
    workers: int | None,
    progress: Progress,
    say: Callable[[str], object],
) -> Iterator[Work]:
    """Open what is asked for and plan it; `say` is called with each remark. Files that are elsewhere arrive meanwhile.

    If only the files of some `ranks` are wanted, so are only some of the source files' bytes: none is fetched, or
    digested, before the plan says which. Raises a `ReshardError`.
    """
    if asked.change.needs_whole:
        fetch(asked.source, revision=asked.revision, choice=asked.choice, progress=progress)
    origin = open_origin(asked.source, revision=asked.revision, choice=asked.choice, include=asked.include)
    spans: Spans = {}
    with (
        origin.ahead() if ranks is None else DigestsAhead({}) as ahead,
        origin.arrivals(stage, keep_cache=keep_cache, at_once=ranks is None, spans=spans) as arrivals,
    ):
        origin = derived_origin(
            origin,
            asked.change,
            dtype=asked.dtype,
            drop_unused=asked.drop_unused,
            workers=workers,
            progress=progress,
        )
        planned = _planned(origin, asked, arrivals, ranks)  # may import transformers; a few gigabytes arrive meanwhile
        for note in planned.notes:
            say(note)
        draft = _with_files(planned, origin)
        yield Work(origin, draft, planned.layouts, ahead, arrivals, spans, keep_cache)


def _with_files(planned: Recut, origin: Origin) -> Manifest:
    """Return the manifest of a plan with all that is known of the files before they are written, or read."""
    ranks, draft, derived = planned.manifest.world_size, planned.manifest, origin.derived
    records = [FileRecord(layout.name, layout.size, UNKNOWN, {}) for layout in planned.layouts]
    read = draft.source_files if origin.made else _unread(origin.original.files)
    told = {**derived.told, "files": [_less_header(file) for file in read]} if derived else draft.derived
    return replace(
        draft,
        tool={"reshard": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        source_files=_unread(derived.source.files) if derived else read,
        derived=told,
        rank_files=tuple(records[:ranks]),
        unused_file=next(iter(records[ranks:]), None),
        extras=(),
    )


def _unread(files: Iterable[SourceFile]) -> tuple[dict[str, Any], ...]:
    return tuple(recorded(file, UNKNOWN) for file in files)


def _less_header(file: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in file.items() if key != "header"}


def completed(
    folder: Path,
    draft: Manifest,
    written: Sequence[FileRecord],
    extras: Sequence[FileRecord],
    digests: Mapping[str, str],
    *,
    workers: int | None,
    progress: Progress,
) -> Manifest:
    """Return the manifest of a `folder` whose files are all written, from its draft, the records of the files, and the
    `digests` of the source files that were read.

    If the source is derived, its own files are nowhere: the rank files are read once more for their digests.
    """
    ranks = draft.world_size
    manifest = replace(
        draft,
        rank_files=tuple(written[:ranks]),
        unused_file=next(iter(written[ranks:]), None),
        extras=tuple(extras),
    )
    if draft.derived:
        read = _with_digests(draft.derived["files"], digests)
        manifest = replace(manifest, derived={**draft.derived, "files": list(read)})
        if any(file["digest"] == UNKNOWN for file in draft.source_files):
            digests = given_back(folder, manifest, workers=workers, progress=progress)
    return replace(manifest, source_files=_with_digests(draft.source_files, digests))


def _with_digests(files: Iterable[Mapping[str, Any]], digests: Mapping[str, str]) -> tuple[dict[str, Any], ...]:
    return tuple(
        {**file, "digest": f"{ALGORITHM}:{digests[file['file']]}"} if file["digest"] == UNKNOWN else dict(file)
        for file in files
    )


def _planned(origin: Origin, asked: Asked, arrivals: Arrivals | None, ranks: Container[int] | None) -> Recut:
    """Plan from the manifest of a resharded folder, if that tells all, else with the model, which imports transformers.

    The manifest is the same either way."""
    strategies = asked.strategies
    changed = asked.tp_plan != AUTO or asked.dtype is not None or asked.drop_unused or origin.derived is not None
    changed = changed or asked.like is not None
    if origin.made and not changed and isinstance(strategies, ParallelInterface) and strategies.is_plain:
        refuse_keys(origin.source.root)
        if found := recut(origin.made, asked.topology):
            return found
    from ..plan import filled, plan_of

    planned = plan_of(
        origin,
        asked.topology,
        tp_plan=asked.tp_plan,
        strategies=strategies,
        dtype=asked.dtype,
        drop_unused=asked.drop_unused,
        like=asked.like,
        arrivals=arrivals,
    )
    before = origin.made.manifest if origin.made else None
    return Recut(_draft(planned, before), filled(planned, origin, ranks), planned.notes)


def _draft(plan: ReshardPlan, before: Manifest | None) -> Manifest:
    """Return the manifest of a plan before any file is written. `before` is that of a resharded source."""
    recorded, derived = (before.source_files, before.derived) if before else ((), None)
    model, source = plan.model, plan.source
    return Manifest(
        tool={},
        architecture=model.architecture,
        model_type=model.model_type,
        dtype=model.dtype,
        topology=plan.topology,
        repo_id=source.repo_id,
        commit=source.commit,
        source_files=recorded,
        parameters=plan.targets,
        hooks=model.hooks,
        custom=plan.custom,
        tied=plan.tied,
        duplicates=plan.duplicates,
        dropped=plan.dropped,
        runtime_only=plan.runtime_only,
        rank_files=(),
        unused_file=None,
        extras=(),
        groups=plan.groups,
        bundles=plan.bundles,
        left=source.left,
        derived=derived,
    )

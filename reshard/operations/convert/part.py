"""One part of a conversion that several machines share: whole rank files, with a record that is written last."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ...checkpoint.source import is_resharded
from ...checkpoint.weights import chosen
from ...errors import BusyError, DestinationExistsError, IntegrityError, StorageError, UsageError
from ...execution.parts.gathering import Gathering, gathering
from ...execution.parts.record import (
    DRAFT_NAME,
    RECORD_NAME,
    VERSIONS,
    PartRecord,
    check_beside,
    is_made_of,
    is_planned_as,
)
from ...execution.parts.share import Part, Share, ranks_of, share_of, size_of
from ...execution.staging import Stage, staged_folder
from ...files.digest import ALGORITHM, digest_file, digest_of
from ...planning.model.rules import AUTO
from ...planning.remarks import announced
from ...process import Progress, patient_collector, silent
from ...resharded.manifest import Manifest
from ...sharding.topology import Topology
from ...storage.disk import write_file
from ...storage.stores import as_text, is_url
from ...strategies.registry import ALL_PARALLEL_STYLES, ParallelInterface
from ..arguments import checked
from ..values.change import AS_IT_IS, change_of
from .finish import finished
from .which import AUTO_PART, which_part
from .work import Asked, Work, prepared

if TYPE_CHECKING:
    import torch

    from ...planning.plan import ReshardPlan

__all__ = ["PartReport", "convert_part", "planned_part"]


@dataclass(frozen=True, slots=True)
class PartReport:
    """What a part did, or is to do: the names of its files, and bytes written, read of the source, and fetched from
    elsewhere (None: only known when it is made).

    `done` says that it was done before, and nothing was written. `manifest` is that of the whole folder, if it is
    finished now.
    """

    part: Part
    files: tuple[str, ...]
    written: int
    read: int | None
    fetched: int | None
    done: bool = False
    manifest: Manifest | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return names, numbers, lists and dicts of them."""
        return {
            "part": self.part.number,
            "of": self.part.of,
            "files": list(self.files),
            "bytes_written": self.written,
            "bytes_read": self.read,
            "bytes_fetched": self.fetched,
            "done_before": self.done,
            "finished": self.manifest is not None,
        }


@checked
@patient_collector()
def convert_part(
    source: str | Path,
    out: str | Path,
    *,
    part: str,
    tp_size: int,
    ep_size: int = 1,
    tp_plan: Mapping[str, str] | str | Path = AUTO,
    strategies: ParallelInterface | str | Path = ALL_PARALLEL_STYLES,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    quantize_config: Mapping[str, Any] | str | Path | None = None,
    quantize_experts: bool = False,
    dequantize: bool = False,
    drop_unused: bool = False,
    weights: str | None = None,
    links_into: Sequence[str | Path] = (),
    include: Sequence[str] = (),
    keep_cache: bool = False,
    workers: int | None = None,
    sync: bool = True,
    progress: Progress = silent,
    say: Callable[[str], object] = lambda _: None,
) -> PartReport:
    """Make one part of what `convert` makes: part I of K is "I/K". Call `finish` once all are done.

    A part is whole rank files, at least one: it is always the same, on any machine, in any order. It may be made twice,
    and at the same time. `OUT.parts`, which all machines must see, has the parts until they are finished; in a store
    their files are in `out` itself. A part that was interrupted goes on where it stopped, on the same machine. With
    "auto", the engine that started this process says which part it is, and the last part to be done finishes the
    folder; with "auto/K" it says so of K parts.

    Only bytes that the part needs are read. If the source is remote they alone are fetched, unless they must be checked
    by their file's digest: that is if the result cannot give them back (`dtype`, `drop_unused`, a quantization), or
    goes into a store. The other arguments are those of `convert`.

    Raises:
        IntegrityError: parts that are done are of another source or plan.
        VersionError: parts that are done were made by other versions.
        ReshardError: what else `convert` raises.
    """
    which = which_part(part, os.environ)
    change = change_of(quantize, quantize_config, experts=quantize_experts, dequantize=dequantize)
    if is_url(as_text(out)) and change != AS_IT_IS:
        raise UsageError(
            "--part: a store cannot be read again for the digests of what is quantized or dequantised",
            hint=f"make the parts in DIR, finish it, then: reshard convert DIR {as_text(out)} --tp-size {tp_size}",
        )
    topology = Topology(tp_size, ep_size)
    ranks_of(which, topology.world_size)  # before any work
    asked = Asked(
        as_text(source),
        topology,
        chosen(weights, links_into),
        change,
        revision=revision,
        include=include,
        tp_plan=tp_plan,
        strategies=strategies,
        dtype=dtype,
        drop_unused=drop_unused,
    )
    parts = gathering(out, sync=sync, progress=progress)
    parts.whole()  # raises if something else is there, before any work
    how: _How = {"keep_cache": keep_cache, "workers": workers, "sync": sync, "progress": progress, "say": say}
    try:
        report = _made(which, asked, parts, **how)
    except (BusyError, IntegrityError, StorageError):
        if parts.whole() is None:
            raise
        report = _made(which, asked, parts, **how)  # the folder was finished meanwhile, and the parts removed
    whole = parts.whole() if report.done else None
    if whole is not None:
        parts.clear()
    elif part.partition("/")[0] == AUTO_PART:
        whole = finished(parts, if_all=True, workers=workers, progress=progress)
    return replace(report, manifest=whole)


class _How(TypedDict):
    keep_cache: bool
    workers: int | None
    sync: bool
    progress: Progress
    say: Callable[[str], object]


def _made(
    which: Part,
    asked: Asked,
    parts: Gathering,
    *,
    keep_cache: bool,
    workers: int | None,
    sync: bool,
    progress: Progress,
    say: Callable[[str], object],
) -> PartReport:
    """Make a part, unless it is done."""
    ranks = ranks_of(which, asked.topology.world_size)
    with staged_folder(parts.stage(which)) as stage:
        say(f"{which}: {announced(asked.source, asked.topology)}")
        with prepared(
            asked, stage, keep_cache=keep_cache, ranks=ranks, workers=workers, progress=progress, say=say
        ) as work:
            inputs = work.inputs
            share = share_of(which, work.layouts, asked.topology.world_size, inputs.source, inputs.computed)
            report = _report(share, {file.name for file in work.origin.coming()})
            if _is_done(parts, which, work, progress):
                return replace(report, written=0, read=0, fetched=0, done=True)
            by_spans = _by_spans(share, work) if asked.dtype is None and parts.is_read_again else {}
            work.spans.update(by_spans)
            _write(stage, share, work, tuple(sorted(by_spans)), workers=workers, sync=sync, progress=progress)
            return report


def planned_part(plan: ReshardPlan, part: str, *, changed: bool = False) -> PartReport:
    """Return what a part of this plan is to do. What it reads is not known if values are `changed`, or if the source is
    resharded. Raises UsageError if there is no such part."""
    from ...planning.plan import plan_layouts

    which, world_size = which_part(part, os.environ), plan.topology.world_size
    share = share_of(which, plan_layouts(plan, filled=ranks_of(which, world_size)), world_size, plan.source)
    report = _report(share, {file.name for file in plan.source.files if not file.path.exists()})
    return replace(report, read=None, fetched=None) if changed or is_resharded(plan.source.root) else report


def _report(share: Share, coming: Container[str]) -> PartReport:
    fetched = sum(size_of(spans) for name, spans in share.spans.items() if name in coming)
    return PartReport(share.part, tuple(layout.name for layout in share.layouts), share.written, share.read, fetched)


def _by_spans(share: Share, work: Work) -> dict[str, Any]:
    """Return the files of which only some bytes are to be fetched: what the rank files give back can be checked."""
    draft, origin = work.draft, work.origin
    if origin.made or origin.derived or draft.dropped:
        return {}
    sizes = {file.name: file.size for file in origin.coming()}
    return {name: spans for name, spans in share.spans.items() if name in sizes and size_of(spans) < sizes[name]}


def _work(work: Work) -> dict[str, str]:
    """Return what decides the bytes of all parts, by name."""
    versions = ", ".join(f"{name} {version}" for name, version in work.draft.tool.items())
    small = digest_of(repr(sorted(work.small_files().items())).encode())
    return {VERSIONS: versions, **work.digests(), "set of small files": small}


def _is_done(parts: Gathering, part: Part, work: Work, progress: Progress) -> bool:
    """Whether the part is done, or the whole folder is there. Raises a ReshardError if that is of other work."""
    records = parts.records()
    check_beside(part, _work(work), records, parts.at, where=parts.name)
    found = records.get(part)
    complete = found is not None and not parts.lacks(found)
    whole = parts.whole()  # looked for last: the files of a part that lacks them may just have been put there
    if whole is not None:
        if not _is_in(whole, work, found, progress):
            raise DestinationExistsError(
                f"{parts.place}: already exists, and is not known to be of this source",
                hint="if it is, all parts are done; else choose another name",
            )
        return True
    if not complete:
        parts.forget(part)
    return complete


def _is_in(whole: Manifest, work: Work, found: PartRecord | None, progress: Progress) -> bool:
    """Whether a folder that is there is what the parts make, byte for byte. The record of a part of this work tells;
    else the source's own digests do, for which its files are read unless a commit says that they are the same."""
    if not is_planned_as(whole, work.draft):
        return False
    if found is not None:
        return is_made_of(whole, [found])
    small = {record.name: record.digest for record in whole.extras}
    if any(small.get(name) != digest for name, digest in work.small_files().items()):
        return False
    known, origin = _read_digests(whole), work.origin
    if origin.made:
        return known == _read_digests(work.draft)
    if origin.version:
        return whole.commit is not None  # it is the same, or the plan would differ; of a store nothing tells
    files = origin.original.files
    with progress(sum(file.size for file in files), "comparing") as report:
        for file in files:
            if known[file.name] != f"{ALGORITHM}:{digest_file(file.path)}":
                return False
            report(file.size)
    return True


def _read_digests(manifest: Manifest) -> dict[str, str]:
    files = manifest.derived["files"] if manifest.derived else manifest.source_files
    return {file["file"]: file["digest"] for file in files}


def _write(
    stage: Stage,
    share: Share,
    work: Work,
    unchecked: tuple[str, ...],
    *,
    workers: int | None,
    sync: bool,
    progress: Progress,
) -> None:
    own, first = _work(work), share.part.number == 1
    folder = stage.begin(digest_of(repr(own).encode()))
    written, digests = work.write(
        stage,
        folder,
        share.layouts,
        digested=share.digested,
        extras=first,
        workers=workers,
        sync=sync,
        progress=progress,
    )
    draft = work.draft.to_bytes()
    record = PartRecord(
        share.part,
        own,
        digest_of(draft),
        tuple(written),
        tuple(work.copy_extras(folder, sync=sync)) if first else (),
        {} if work.origin.made else digests,
        unchecked,
    )
    write_file(folder / DRAFT_NAME, draft, sync=sync)
    write_file(folder / RECORD_NAME, record.to_bytes(), sync=sync)

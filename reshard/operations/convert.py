"""The conversion of a checkpoint: plan it, write the rank files into a staged folder, then move it to its path."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..checkpoint.source import MANIFEST_NAME, Source
from ..checkpoint.weights import chosen
from ..execution.destination import destination
from ..execution.executor import Inputs, write_files
from ..execution.journal import Journal
from ..execution.origin import Origin, open_origin
from ..execution.staging import staged_folder
from ..files.digest import ALGORITHM, new_digest
from ..files.untrusted import vetted_path
from ..planning.plan import ReshardPlan
from ..planning.rules import AUTO
from ..process import Progress, silent
from ..resharded.layout import FileLayout
from ..resharded.manifest import REFERENCE_NAME, Manifest
from ..resharded.rank_file import FileRecord
from ..sharding.topology import Topology
from ..storage.disk import check_free_space, copy_file, write_file
from ..storage.stores import as_text
from ..strategies.registry import ALL_PARALLEL_STYLES, ParallelInterface
from .arguments import checked
from .reference import fetch_whole, store_reference

if TYPE_CHECKING:
    import torch

from .plan import announced, plan_files

__all__ = [
    "convert",
]

_MANIFEST_SHARE = 1 << 20  # bytes kept free for the manifest and the folder itself


@checked
def convert(
    source: str | Path,
    out: str | Path,
    *,
    tp_size: int,
    ep_size: int = 1,
    tp_plan: Mapping[str, str] | str | Path = AUTO,
    strategies: ParallelInterface | str | Path = ALL_PARALLEL_STYLES,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    drop_unused: bool = False,
    weights: str | None = None,
    links_into: Sequence[str | Path] = (),
    include: Sequence[str] = (),
    overwrite: bool = False,
    keep_cache: bool = False,
    reference_logits: bool = False,
    workers: int | None = None,
    sync: bool = True,
    progress: Progress = silent,
    say: Callable[[str], object] = lambda _: None,
) -> Manifest:
    """Reshard a checkpoint (folder, Hub id or URL) into `out` (folder or URL), one safetensors file for each rank.

    If the source is a resharded folder, its rank files give the same bytes as the checkpoint it was made from.
    `out` appears in one step when everything is on disk. If the call fails, an earlier `out` is untouched, and what was
    written stays beside it in `OUT.part-…`, from where the same call resumes. Memory does not grow with the model (see
    `write_files`). The arguments that say what to cut, and how, are those of `plan`.
    Remote files that are not in the cache are fetched two ahead of the cutting, and removed once they are cut; with
    `keep_cache` they stay in the cache.
    `reference_logits` stores what the single-process model computes on a few fixed tokens, for `reshard check`. Only
    this loads the model: it needs memory for it (see `store_reference`), and all files of a remote one in the cache.
    `sync` waits until everything is on disk; without it a power loss can undo a finished conversion.
    `progress` is told of bytes written, and sent (see `reshard.process.Progress`). `say` is called with lines of text:
    one when planning begins, then each of the plan's `notes`.

    Raises:
        ReshardError: the subclass and its exit code say which kind of failure.
    """
    topology, choice = Topology(tp_size, ep_size), chosen(weights, links_into)
    with staged_folder(destination(out, overwrite=overwrite, sync=sync, progress=progress)) as stage:
        say(announced(source, topology))
        if reference_logits:
            whole, revision = fetch_whole(as_text(source), revision=revision, choice=choice)
        origin = open_origin(as_text(source), revision=revision, choice=choice, include=include)
        checkpoint, made = origin.source, origin.made
        with origin.ahead() as ahead, origin.arrivals(stage, keep_cache=keep_cache) as arrivals:
            planned, layouts = plan_files(  # imports transformers; a few gigabytes arrive meanwhile
                origin,
                topology,
                tp_plan=tp_plan,
                strategies=strategies,
                dtype=dtype,
                drop_unused=drop_unused,
                arrivals=arrivals,
            )
            for note in planned.notes:
                say(note)
            folder = stage.begin(_work(planned, layouts, origin))
            total = sum(layout.size for layout in layouts)
            extras_size = sum((checkpoint.root / name).stat().st_size for name in checkpoint.extras)
            staged = 0 if keep_cache else origin.staged_bytes()
            check_free_space(folder, total + staged + extras_size + _MANIFEST_SHARE, origin.staged(stage))
            inputs = Inputs(origin.held, ahead, arrivals, made.records if made else None)
            with progress(total, "writing") as report, contextlib.closing(Journal(folder)) as journal:
                written, source_digests = write_files(
                    folder,
                    layouts,
                    inputs,
                    journal=journal,
                    workers=workers,
                    sync=sync,
                    progress=report,
                )
        same = made is None or made.manifest.dtype == planned.model.dtype
        kept = [name for name in checkpoint.extras if name != REFERENCE_NAME or same]
        root = checkpoint.root
        extras = [copy_file(vetted_path(root, name, what="source"), folder, name, sync=sync) for name in kept]
        if reference_logits:
            extras.append(store_reference(whole, folder, planned.model.dtype, choice=choice, sync=sync))
        recorded = made.manifest.source_files if made else _source_files(checkpoint, source_digests)
        manifest = _manifest(planned, written, recorded, extras)
        write_file(folder / MANIFEST_NAME, manifest.to_bytes(), sync=sync)
    return manifest


def _work(plan: ReshardPlan, layouts: list[FileLayout], origin: Origin) -> str:
    """Return a digest of all that the rank files depend on: the files read, as they are now, and where elements go."""
    digest = new_digest()
    digest.update(origin.version.encode())
    for file in origin.held.files:
        digest.update(repr((file.name, file.size, file.mtime_ns)).encode() + file.header.raw)
    for thing in (*plan.source.extras, *plan.targets):
        digest.update(repr(thing).encode())
    for layout in layouts:
        digest.update(f"{layout.name} ".encode() + layout.head)
    return digest.hexdigest()


def _source_files(source: Source, digests: Mapping[str, str]) -> tuple[dict[str, Any], ...]:
    return tuple(
        {
            "file": file.name,
            "size": file.size,
            "digest": f"{ALGORITHM}:{digests[file.name]}",
            "header": file.header.raw.decode(),
        }
        for file in source.files
    )


def _manifest(
    plan: ReshardPlan, written: list[FileRecord], source_files: tuple[dict[str, Any], ...], extras: list[FileRecord]
) -> Manifest:
    model, source = plan.model, plan.source
    return Manifest(
        tool={"reshard": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        architecture=model.architecture,
        model_type=model.model_type,
        dtype=model.dtype,
        topology=plan.topology,
        repo_id=source.repo_id,
        commit=source.commit,
        source_files=source_files,
        parameters=plan.targets,
        hooks=model.hooks,
        custom=plan.custom,
        tied=plan.tied,
        duplicates=plan.duplicates,
        dropped=plan.dropped,
        runtime_only=plan.runtime_only,
        rank_files=tuple(written[: plan.world_size]),
        unused_file=written[plan.world_size] if plan.unused else None,
        extras=tuple(extras),
        groups=plan.groups,
        bundles=plan.bundles,
        left=source.left,
    )

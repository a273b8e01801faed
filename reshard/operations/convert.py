"""The conversion of a checkpoint: plan it, write the rank files into a staged folder, then move it to its path."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..checkpoint.left_behind import refuse_keys
from ..checkpoint.source import MANIFEST_NAME
from ..checkpoint.weights import chosen
from ..execution.destination import destination
from ..execution.executor import Inputs, write_files
from ..execution.journal import Journal
from ..execution.origin import Origin, open_origin
from ..execution.staging import staged_folder
from ..files.digest import new_digest
from ..files.untrusted import vetted_path
from ..planning.model.rules import AUTO
from ..planning.recut import Recut, recut
from ..planning.remarks import announced
from ..process import Progress, patient_collector, silent
from ..resharded.as_source import recorded
from ..resharded.layout import FileLayout
from ..resharded.manifest import REFERENCE_NAME, Manifest
from ..sharding.topology import Topology
from ..storage.disk import check_free_space, copy_file, write_file
from ..storage.stores import as_text
from ..strategies.registry import ALL_PARALLEL_STYLES, ParallelInterface
from .arguments import checked

if TYPE_CHECKING:
    import torch

    from ..planning.plan import ReshardPlan
    from ..storage.prefetch import Arrivals

__all__ = [
    "convert",
]

_MANIFEST_SHARE = 1 << 20  # bytes kept free for the manifest and the folder itself


@checked
@patient_collector()
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
        say(announced(as_text(source), topology))
        if reference_logits:
            from .reference import fetch_whole, store_reference

            whole, revision = fetch_whole(as_text(source), revision=revision, choice=choice)
        origin = open_origin(as_text(source), revision=revision, choice=choice, include=include)
        checkpoint, made = origin.source, origin.made
        with origin.ahead() as ahead, origin.arrivals(stage, keep_cache=keep_cache) as arrivals:
            planned = _planned(  # may import transformers; a few gigabytes arrive meanwhile
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
            draft, layouts = planned.manifest, planned.layouts
            folder = stage.begin(_work(draft, layouts, origin))
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
        same = made is None or made.manifest.dtype == draft.dtype
        kept = [name for name in checkpoint.extras if name != REFERENCE_NAME or same]
        root = checkpoint.root
        extras = [copy_file(vetted_path(root, name, what="source"), folder, name, sync=sync) for name in kept]
        if reference_logits:
            extras.append(store_reference(whole, folder, draft.dtype, choice=choice, sync=sync))
        manifest = replace(
            draft,
            tool={"reshard": __version__, **{name: version(name) for name in ("torch", "transformers")}},
            source_files=draft.source_files if made else recorded(checkpoint.files, source_digests),
            rank_files=tuple(written[: topology.world_size]),
            unused_file=next(iter(written[topology.world_size :]), None),
            extras=tuple(extras),
        )
        write_file(folder / MANIFEST_NAME, manifest.to_bytes(), sync=sync)
    return manifest


def _planned(
    origin: Origin,
    topology: Topology,
    *,
    tp_plan: Mapping[str, str] | str | Path,
    strategies: ParallelInterface | str | Path,
    dtype: str | None,
    drop_unused: bool,
    arrivals: Arrivals | None,
) -> Recut:
    """Plan from the manifest of a resharded folder, if that tells all, else with the model, which imports transformers.

    The manifest is the same either way."""
    changed = tp_plan != AUTO or dtype is not None or drop_unused
    if origin.made and not changed and isinstance(strategies, ParallelInterface) and strategies.is_plain:
        refuse_keys(origin.source.root)
        if found := recut(origin.made, topology):
            return found
    from .plan import filled, plan_of

    planned = plan_of(
        origin,
        topology,
        tp_plan=tp_plan,
        strategies=strategies,
        dtype=dtype,
        drop_unused=drop_unused,
        arrivals=arrivals,
    )
    recorded = origin.made.manifest.source_files if origin.made else ()
    return Recut(_draft(planned, recorded), filled(planned, origin), planned.notes)


def _work(draft: Manifest, layouts: list[FileLayout], origin: Origin) -> str:
    """Return a digest of all that the rank files depend on: the files read, as they are now, and where elements go."""
    digest = new_digest()
    digest.update(origin.version.encode())
    for file in origin.held.files:
        digest.update(repr((file.name, file.size, file.mtime_ns)).encode() + file.header.raw)
    for thing in (*origin.source.extras, *draft.parameters):
        digest.update(repr(thing).encode())
    for layout in layouts:
        digest.update(f"{layout.name} ".encode() + layout.head)
    return digest.hexdigest()


def _draft(plan: ReshardPlan, recorded: tuple[dict[str, Any], ...]) -> Manifest:
    """Return the manifest of a plan before any file is written. `recorded` are the source files, if they are known."""
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
    )

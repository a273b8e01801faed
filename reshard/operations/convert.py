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
from ..files.digest import digest_of, new_digest
from ..files.untrusted import vetted_path
from ..planning.model.rules import AUTO
from ..planning.recut import Recut, recut
from ..planning.remarks import announced
from ..process import Progress, patient_collector, silent
from ..resharded.as_source import recorded
from ..resharded.derived import CONFIG_NAME
from ..resharded.layout import FileLayout
from ..resharded.manifest import REFERENCE_NAME, Manifest
from ..resharded.rank_file import FileRecord
from ..sharding.topology import Topology
from ..storage.disk import check_free_space, copy_file, write_file
from ..storage.locate import fetch
from ..storage.stores import as_text
from ..strategies.registry import ALL_PARALLEL_STYLES, ParallelInterface
from .arguments import checked
from .values.change import change_of, derived_origin, with_recorded_files

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
    quantize: str | None = None,
    quantize_config: Mapping[str, Any] | str | Path | None = None,
    quantize_experts: bool = False,
    dequantize: bool = False,
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
    change = change_of(quantize, quantize_config, experts=quantize_experts, dequantize=dequantize)
    with staged_folder(destination(out, overwrite=overwrite, sync=sync, progress=progress)) as stage:
        say(announced(as_text(source), topology))
        if reference_logits:
            from .reference import fetch_whole, store_reference

            whole, revision = fetch_whole(as_text(source), revision=revision, choice=choice)
        if change.needs_whole:
            fetch(as_text(source), revision=revision, choice=choice, progress=progress)
        origin = open_origin(as_text(source), revision=revision, choice=choice, include=include)
        made = origin.made
        with origin.ahead() as ahead, origin.arrivals(stage, keep_cache=keep_cache) as arrivals:
            origin = derived_origin(
                origin, change, dtype=dtype, drop_unused=drop_unused, workers=workers, progress=progress
            )
            checkpoint, derived = origin.source, origin.derived
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
            records = made.records if made else None
            inputs = Inputs(origin.held, ahead, arrivals, records, derived.computed if derived else {})
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
        same = derived is None and (made is None or made.manifest.dtype == draft.dtype)
        kept = [name for name in checkpoint.extras if name != REFERENCE_NAME or same]
        root = checkpoint.root
        kept = [name for name in kept if derived is None or name != CONFIG_NAME]
        extras = [copy_file(vetted_path(root, name, what="source"), folder, name, sync=sync) for name in kept]
        if derived:
            write_file(folder / CONFIG_NAME, derived.config, sync=sync)
            extras.append(FileRecord(CONFIG_NAME, len(derived.config), digest_of(derived.config), {}))
        if reference_logits:
            extras.append(store_reference(whole, folder, draft.dtype, choice=choice, sync=sync, derived=derived))
        found = draft.source_files if made else recorded(origin.original.files, source_digests)
        manifest = replace(
            draft,
            tool={"reshard": __version__, **{name: version(name) for name in ("torch", "transformers")}},
            source_files=found,
            rank_files=tuple(written[: topology.world_size]),
            unused_file=next(iter(written[topology.world_size :]), None),
            extras=tuple(extras),
        )
        if derived:
            manifest = replace(manifest, derived={**derived.told, "files": [_less_header(file) for file in found]})
            manifest = with_recorded_files(folder, manifest, origin, workers=workers, progress=progress)
        write_file(folder / MANIFEST_NAME, manifest.to_bytes(), sync=sync)
    return manifest


def _less_header(file: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in file.items() if key != "header"}


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
    changed = tp_plan != AUTO or dtype is not None or drop_unused or origin.derived is not None
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
    before = origin.made.manifest if origin.made else None
    return Recut(_draft(planned, before), filled(planned, origin), planned.notes)


def _work(draft: Manifest, layouts: list[FileLayout], origin: Origin) -> str:
    """Return a digest of all that the rank files depend on: the files read, as they are now, and where elements go."""
    digest = new_digest()
    digest.update(origin.version.encode())
    for file in origin.held.files:
        digest.update(repr((file.name, file.size, file.mtime_ns)).encode() + file.header.raw)
    if origin.derived:
        digest.update(origin.derived.digest().encode())
    for thing in (*origin.source.extras, *draft.parameters):
        digest.update(repr(thing).encode())
    for layout in layouts:
        digest.update(f"{layout.name} ".encode() + layout.head)
    return digest.hexdigest()


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

"""The conversion of a checkpoint: plan it, write the rank files into a staged folder, then move it to its path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoint.source import MANIFEST_NAME
from ...checkpoint.weights import chosen
from ...errors import UsageError
from ...execution.destination import destination
from ...execution.earlier import open_earlier
from ...execution.staging import staged_folder
from ...files.digest import digest_of
from ...planning.model.rules import AUTO
from ...planning.remarks import announced
from ...process import Progress, patient_collector, silent
from ...resharded.manifest import Manifest
from ...sharding.topology import Topology
from ...storage.disk import write_file
from ...storage.stores import as_text
from ...strategies.registry import ALL_PARALLEL_STYLES, ParallelInterface
from ...text import printable
from ..arguments import checked
from ..values.change import AS_IT_IS, change_of
from .like import pattern_of
from .work import Asked, completed, prepared

if TYPE_CHECKING:
    import torch

__all__ = ["convert"]


@checked
@patient_collector()
def convert(
    source: str | Path,
    out: str | Path,
    *,
    tp_size: int | None = None,
    like: str | Path | None = None,
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
    `like` is a resharded folder of the same model, here: with new weights, everything that `tp_size` and the options
    of the plan would say is taken from it (but `strategies`, since code is not). Where the file system can share blocks
    (XFS with reflink, btrfs), tensors whose bytes are the same take no room. The result is that of a fresh conversion.
    `reference_logits` stores what the single-process model computes on a few fixed tokens, for `reshard check`. Only
    this loads the model: it needs memory for it (see `store_reference`), and all files of a remote one in the cache.
    `sync` waits until everything is on disk; without it a power loss can undo a finished conversion.
    `progress` is told of bytes written, and sent (see `reshard.process.Progress`). `say` is called with lines of text:
    one when planning begins, then each of the plan's `notes`.

    Raises:
        ReshardError: the subclass and its exit code say which kind of failure.
    """
    choice, pattern = chosen(weights, links_into), None
    change = change_of(quantize, quantize_config, experts=quantize_experts, dequantize=dequantize)
    if like is not None:
        if tp_size is not None or ep_size > 1 or tp_plan != AUTO or dtype or change != AS_IT_IS or drop_unused:
            raise UsageError(
                "--like takes the number of ranks, the plan, dtypes and quantization from that folder",
                hint="leave out the options that say them",
            )
        pattern = pattern_of(like)
        change, dtype, drop_unused = pattern.change, pattern.dtype, pattern.drop_unused
    if tp_size is None and pattern is None:
        raise UsageError("--tp-size is missing", hint="give --tp-size 2, or --like DIR")
    topology = pattern.topology if pattern else Topology(tp_size or 1, ep_size)
    with staged_folder(destination(out, overwrite=overwrite, sync=sync, progress=progress)) as stage:
        say(announced(as_text(source), topology))
        if reference_logits:
            from ..reference import fetch_whole, store_reference

            whole, revision = fetch_whole(as_text(source), revision=revision, choice=choice)
        asked = Asked(
            as_text(source),
            topology,
            choice,
            change,
            revision=revision,
            include=include,
            tp_plan=tp_plan,
            strategies=strategies,
            dtype=dtype,
            drop_unused=drop_unused,
            like=pattern.manifest if pattern else None,
        )
        with prepared(asked, stage, keep_cache=keep_cache, workers=workers, progress=progress, say=say) as work:
            if pattern:
                pattern.check(work.draft)
            folder = stage.begin(digest_of(repr(work.digests()).encode()))
            earlier = open_earlier(pattern.folder, pattern.manifest) if pattern else None
            written, digests = work.write(
                stage, folder, work.layouts, earlier=earlier, workers=workers, sync=sync, progress=progress
            )
        if pattern and earlier:
            say(f"{earlier.shared:,} bytes are shared with {printable(pattern.folder)}")
        extras = work.copy_extras(folder, sync=sync)
        if reference_logits:
            derived = work.origin.derived
            extras.append(store_reference(whole, folder, work.draft.dtype, choice=choice, sync=sync, derived=derived))
        manifest = completed(folder, work.draft, written, extras, digests, workers=workers, progress=progress)
        write_file(folder / MANIFEST_NAME, manifest.to_bytes(), sync=sync)
    return manifest

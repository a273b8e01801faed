"""Convert a checkpoint: plan it, write the rank files into a staged folder, and put the folder in its place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

from ._version import __version__
from .digest import ALGORITHM, FileRecord, digest_of
from .executor import write_files
from .hub import resolve_source
from .layout import UNUSED_NAME, FileLayout, file_layout, rank_file_name
from .manifest import Manifest
from .model import read_model
from .placement import PackedShard
from .planning import ReshardPlan, build_plan
from .reader import equal_tensors
from .source import MANIFEST_NAME, Source
from .staging import check_free_space, copy_file, staged_folder, write_file
from .targets import rank_tensors, unused_tensors

__all__ = ["convert", "plan", "plan_layouts"]

_MANIFEST_SHARE = 1 << 20  # bytes kept free for the manifest and the folder itself


def plan(
    source: str | Path,
    *,
    tp_size: int,
    revision: str | None = None,
    dtype: str | None = None,
    drop_unused: bool = False,
) -> ReshardPlan:
    """Plan a checkpoint (folder or Hub id) for `tp_size` ranks, from its headers alone.

    `dtype` (a torch name such as `bfloat16`) stores every floating parameter in that dtype, except those the model
    keeps in fp32. Raises a `ReshardError`.
    """
    return _plan(resolve_source(str(source), revision=revision), tp_size, dtype, drop_unused)


def _plan(source: Source, tp_size: int, dtype: str | None, drop_unused: bool) -> ReshardPlan:
    model = read_model(source, dtype=dtype)
    return build_plan(
        source,
        model,
        tp_size,
        cast=dtype is not None,
        drop_unused=drop_unused,
        equal=partial(equal_tensors, source),
    )


def plan_layouts(plan: ReshardPlan) -> list[FileLayout]:
    """Every file the plan writes: one for each rank, and the unused tensors' if there are any."""
    rectangles = frozenset(
        target.name for target in plan.targets if plan.world_size == 1 or not isinstance(target.placement, PackedShard)
    )
    layouts = [
        file_layout(
            rank_file_name(rank),
            rank_tensors(plan.targets, rank=rank, world_size=plan.world_size),
            boxes=rectangles,
        )
        for rank in range(plan.world_size)
    ]
    if plan.unused:
        layouts.append(file_layout(UNUSED_NAME, unused_tensors(plan.source, plan.unused)))
    return layouts


def convert(
    source: str | Path,
    out: str | Path,
    *,
    tp_size: int,
    revision: str | None = None,
    dtype: str | None = None,
    drop_unused: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[int], contextlib.AbstractContextManager[Callable[[int], object]]] | None = None,
) -> Manifest:
    """Reshard a checkpoint (folder or Hub id) into `out`, one safetensors file for each of `tp_size` ranks.

    `out` appears in one step when everything is on disk; on any failure nothing is left and an earlier `out` is
    untouched. Memory does not grow with the model (see `write_files`). `progress`, given the bytes to write, returns a
    context manager whose value is called with the bytes just written.

    Raises:
        ReshardError: its subclass and exit code say which kind of failure.
    """
    out = Path(out)
    with staged_folder(out, overwrite=overwrite) as folder:
        planned = _plan(resolve_source(str(source), revision=revision), tp_size, dtype, drop_unused)
        layouts = plan_layouts(planned)
        total = sum(layout.size for layout in layouts)
        extras_size = sum((planned.source.root / name).stat().st_size for name in planned.source.extras)
        check_free_space(folder, total + extras_size + _MANIFEST_SHARE)
        with (progress or _silent)(total) as report:
            written, source_digests = write_files(folder, layouts, planned.source, workers=workers, progress=report)
        extras = [_copy(planned.source, name, folder) for name in planned.source.extras]
        manifest = _manifest(planned, written, source_digests, extras)
        write_file(folder / MANIFEST_NAME, manifest.to_bytes())
    return manifest


@contextlib.contextmanager
def _silent(_: int) -> Iterator[Callable[[int], object]]:
    yield lambda _: None


def _copy(source: Source, name: str, folder: Path) -> FileRecord:
    data = copy_file(source.root / name, folder / name)
    return FileRecord(name, len(data), digest_of(data), {})


def _manifest(
    plan: ReshardPlan, written: list[FileRecord], source_digests: dict[str, str], extras: list[FileRecord]
) -> Manifest:
    model, source = plan.model, plan.source
    return Manifest(
        tool={"reshard": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        architecture=model.architecture,
        model_type=model.model_type,
        dtype=model.dtype,
        world_size=plan.world_size,
        repo_id=source.repo_id,
        commit=source.commit,
        source_files=tuple(
            {
                "file": file.name,
                "size": file.size,
                "digest": f"{ALGORITHM}:{source_digests[file.name]}",
                "header": file.header.raw.decode(),
            }
            for file in source.files
        ),
        parameters=plan.targets,
        hooks=model.hooks,
        tied=plan.tied,
        duplicates=plan.duplicates,
        dropped=plan.dropped,
        runtime_only=plan.runtime_only,
        rank_files=tuple(written[: plan.world_size]),
        unused_file=written[plan.world_size] if plan.unused else None,
        extras=tuple(extras),
    )

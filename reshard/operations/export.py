"""The export of a checkpoint into rank files of the engine that one serves with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..checkpoint.left_behind import refuse_keys
from ..checkpoint.source import MANIFEST_NAME, Source, open_source
from ..checkpoint.weights import Choice, chosen
from ..engines.constants import CONSTANTS_NAME, as_read, constants_file, constants_record
from ..engines.copy_plan import PLAN_NAME, CopyPlan
from ..engines.resolve import Resolved, resolve
from ..engines.tracing import Asked, python_of_engine, traced
from ..errors import BadInputError, RemoteMovedError, UsageError
from ..execution.destination import destination
from ..execution.executor import Inputs, write_files
from ..execution.journal import Journal
from ..execution.origin import Origin, open_origin
from ..execution.staging import staged_folder
from ..files.digest import ALGORITHM, digest_of
from ..files.dtypes import CODES
from ..files.header import TensorInfo
from ..files.untrusted import vetted_path
from ..process import Progress, patient_collector, silent
from ..resharded.as_source import Resharded, open_resharded, recorded
from ..resharded.layout import FileLayout, file_layout
from ..resharded.manifest import REFERENCE_NAME, Manifest
from ..resharded.manifest_json import ENGINES
from ..resharded.rank_file import FileRecord
from ..resharded.targets import LocalTensor
from ..sharding.regions import whole
from ..sharding.topology import Topology
from ..storage.disk import check_free_space, copy_file, write_file
from ..storage.locate import fetch
from ..storage.stores import as_text
from ..text import listed, printable
from .arguments import checked

if TYPE_CHECKING:
    import torch

__all__ = ["TESTED", "export"]

TESTED = ("0.32.0",)  # the versions of vLLM that the tests run
_FILES = {False: "model-rank-{tp}-part-0.safetensors", True: "model-pp-{pp}-tp-{tp}-part-0.safetensors"}  # by stages
_MANIFEST_SHARE = 1 << 20


@checked
@patient_collector()
def export(
    source: str | Path,
    out: str | Path,
    *,
    engine: str = "vllm",
    tp_size: int | None = None,
    pipeline_size: int = 1,
    ep: bool = False,
    engine_python: str | Path | None = None,
    plan: str | Path | None = None,
    platform: str | None = None,
    capability: tuple[int, int] | None = None,
    moe_backend: str | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    weights: str | None = None,
    links_into: Sequence[str | Path] = (),
    include: Sequence[str] = (),
    overwrite: bool = False,
    dry_run: bool = False,
    workers: int | None = None,
    sync: bool = True,
    progress: Progress = silent,
    say: Callable[[str], object] = lambda _: None,
) -> Manifest:
    """Write a checkpoint (folder, resharded folder, Hub id or URL) into `out` as the rank files that an engine loads.

    For vLLM these are the files of `--load-format sharded_state`, for `tp_size` × `pipeline_size` ranks; with `ep`, for
    `--enable-expert-parallel`. vLLM's own loader says where each element belongs: it is run without weights by the
    Python at `engine_python` (default: this one), for the `platform` and its compute `capability` ("cuda" and (9,
    0), say; default: what vLLM finds). `moe_backend` and `dtype` are the engine's options. What it says is a copy plan,
    kept in `out`; an earlier one can be given as `plan` instead. With `dry_run` nothing is written, and the result has
    no digests. The other arguments are those of `convert`.

    Raises:
        BadInputError: the engine cannot load the checkpoint, or not by copies alone; or the plan is for another one.
        ReshardError: the subclass and its exit code say which kind of failure.
    """
    if engine not in ENGINES:
        raise UsageError(
            f"{printable(engine)}: no engine that rank files are made for", hint=f"one of {listed(ENGINES)}"
        )
    if (plan is None) == (tp_size is None):
        raise UsageError("export takes the number of ranks, or a plan that was made for one", hint="give --tp-size N")
    if (platform is None) != (capability is None):
        raise UsageError(
            "a platform is chosen by its name and its compute capability",
            hint="give both: --platform cuda --capability 9.0",
        )
    if platform not in (None, "cuda"):
        raise UsageError(
            f"{printable(platform)}: no platform that can be planned for elsewhere", hint="--platform cuda"
        )
    if plan is not None and (pipeline_size != 1 or ep or engine_python or platform or moe_backend or dtype):
        raise UsageError(
            "a plan says for which ranks, platform, dtype and kernels it is", hint="leave these options out"
        )
    python = python_of_engine(engine_python) if plan is None else None
    with staged_folder(destination(out, overwrite=overwrite, sync=sync, progress=progress)) as stage:
        choice = chosen(weights, links_into)
        origin = open_origin(as_text(source), revision=revision, choice=choice, include=include)
        refuse_keys(origin.source.root)
        if plan is not None:
            found = CopyPlan.read(Path(plan))
        else:
            assert python is not None
            assert tp_size is not None
            say(f"asking {printable(python)} where vLLM puts each tensor")
            asked = Asked(tp_size, pipeline_size, ep, platform, capability, dtype, moe_backend)
            files = ("config.json", *origin.source.extras)
            found = traced(asked, origin.source.tensors, origin.source.root, files, python=python)
        _check_backend(found)
        for note in _notes(found.engine):
            say(note)
        resolved = resolve(found, origin.source.tensors, origin.source.config)
        if resolved.left_out:
            say(f"vLLM does not read {len(resolved.left_out)} tensors: {listed(resolved.left_out)}")
        draft = _draft(found, resolved, origin.source)
        if dry_run:
            planned = (FileRecord(layout.name, layout.size, "", {}) for layout in _layouts(draft, found))
            return replace(draft, rank_files=tuple(planned))
        if origin.remote:
            fetch(as_text(source), revision=revision, choice=choice, progress=progress)
            origin = _fetched(origin, choice, include)
        checkpoint, made, root = origin.source, origin.made, origin.source.root
        constants = constants_file(resolved.constants)
        folder = stage.begin(_work(found, constants, origin.held))
        write_file(folder / CONSTANTS_NAME, constants, sync=sync)
        read = as_read(origin.held, folder / CONSTANTS_NAME, {} if made else resolved.taken_for)
        layouts = _layouts(draft, found)
        if made:
            layouts = _from_rank_files(layouts, made, resolved)
        total = sum(layout.size for layout in layouts)
        check_free_space(folder, total + _MANIFEST_SHARE)
        with progress(total, "writing") as report, contextlib.closing(Journal(folder)) as journal:
            written, digests = write_files(
                folder,
                layouts,
                Inputs(read, records={**made.records, CONSTANTS_NAME: constants_record(constants)} if made else None),
                journal=journal,
                workers=workers,
                sync=sync,
                progress=report,
            )
        kept = [name for name in checkpoint.extras if name not in (REFERENCE_NAME, PLAN_NAME, CONSTANTS_NAME)]
        extras = [copy_file(vetted_path(root, name, what="source"), folder, name, sync=sync) for name in kept]
        for name, data in ((PLAN_NAME, found.packed()), (CONSTANTS_NAME, constants)):
            write_file(folder / name, data, sync=sync)
            extras.append(FileRecord(name, len(data), digest_of(data), {}))
        manifest = replace(
            draft,
            source_files=made.manifest.source_files
            if made
            else tuple(recorded(file, f"{ALGORITHM}:{digests[file.name]}") for file in checkpoint.files),
            rank_files=tuple(written),
            extras=tuple(extras),
        )
        write_file(folder / MANIFEST_NAME, manifest.to_bytes(), sync=sync)
    return manifest


def _fetched(origin: Origin, choice: Choice, include: Sequence[str]) -> Origin:
    """Open what was elsewhere, now that it is here. Raises RemoteMovedError if it is another one than was planned."""
    was = origin.source
    if origin.made:
        made = open_resharded(was.root)
        now = Origin(made.source, made=made)
    else:
        here = open_source(was.root, choice=choice, repo_id=was.repo_id, commit=was.commit, include=include)
        now = Origin(here)
    if now.source.tensors != was.tensors:
        raise RemoteMovedError(f"{printable(was.root)}: has changed since it was planned", hint="run it again")
    return now


def _check_backend(plan: CopyPlan) -> None:
    """Raise UsageError if experts are laid out for kernels that nobody named.

    A server may choose others, and its loader takes files of other shapes with no more than a warning.
    """
    chosen = sorted({backend for rank in plan.ranks for backend in rank.backends})
    if chosen and plan.engine["platform"] != "cpu" and plan.engine["moe_backend"] is None:
        raise UsageError(
            f"the shapes of experts can depend on the kernels that run them, and vLLM chose {listed(chosen)}",
            hint=f"name them, here and when you serve: --moe-backend {printable(chosen[0])}",
        )


def _notes(engine: dict[str, Any]) -> list[str]:
    found = []
    if engine["version"].partition("+")[0] not in TESTED:
        found.append(f"vLLM {printable(engine['version'])} is not among the tested versions: {', '.join(TESTED)}")
    if engine["platform"] == "cpu":
        found.append("these files are for vLLM on a CPU: --platform cuda --capability 9.0 makes them for a GPU")
    return found


def _draft(plan: CopyPlan, resolved: Resolved, source: Source) -> Manifest:
    return Manifest(
        tool={"reshard": __version__},
        architecture=plan.engine["architecture"],
        model_type=str(source.config.get("model_type", "")),
        dtype=plan.engine["dtype"],
        topology=Topology(len(plan.ranks)),
        repo_id=source.repo_id,
        commit=source.commit,
        source_files=(),
        parameters=resolved.targets,
        hooks={},
        custom={},
        tied={},
        duplicates={},
        dropped=resolved.left_out,
        runtime_only=(f"its rank files are those of {plan.engine['name']}",),
        rank_files=(),
        unused_file=None,
        extras=(),
        engine={**plan.engine, "taken_for": resolved.taken_for},
        left=source.left,
    )


def _layouts(draft: Manifest, plan: CopyPlan) -> list[FileLayout]:
    pattern = _FILES[plan.engine["pp"] > 1]
    return [
        file_layout(pattern.format(tp=rank.tp, pp=rank.pp), draft.tensors_of(number))
        for number, rank in enumerate(plan.ranks)
    ]


def _from_rank_files(layouts: Sequence[FileLayout], made: Resharded, resolved: Resolved) -> list[FileLayout]:
    """Fill the files from the rank files that a resharded folder has, and from the constants."""
    if resolved.taken_for:
        raise BadInputError(f"{len(resolved.taken_for)} tensors are taken for another dtype: start from the checkpoint")
    tensors, infos = dict(made.tensors), dict(made.source.tensors)
    for name, (dtype, _) in resolved.constants.items():
        tensors[name] = LocalTensor(name, (1,), dtype, (0,), whole(name, (1,)))
        infos[name] = TensorInfo(name, CODES[dtype], (1,), CONSTANTS_NAME, 0, 0)
    known = replace(made, source=replace(made.source, tensors=infos), tensors=tensors)
    return [known.relocated(layout) for layout in layouts]


def _work(plan: CopyPlan, constants: bytes, read: Source) -> str:
    stamps = [repr((file.name, file.size, file.mtime_ns)).encode() + file.header.raw for file in read.files]
    return digest_of(b"".join([plan.text, constants, *stamps]))

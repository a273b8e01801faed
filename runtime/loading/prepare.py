"""The part of a load that a rank does alone: find the folder, read its file, and build the model meanwhile."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import Store
from torch.distributed.device_mesh import DeviceMesh

from reshard.checkpoint.architecture import model_class, on_meta
from reshard.checkpoint.quantization import quantization_of
from reshard.checkpoint.source import MANIFEST_NAME, model_config
from reshard.errors import BadInputError, IntegrityError, UsageError
from reshard.files.digest import digest_of
from reshard.process import worker_count
from reshard.resharded.layout import rank_file_name
from reshard.resharded.manifest import Manifest
from reshard.resharded.rank_file import written_file
from reshard.strategies.registry import ParallelInterface, as_strategies
from reshard.text import printable

from ..distributed.agreement import Deadline
from ..distributed.mesh import pick_device
from ..distributed.ranks import RankInfo
from ..distributed.replicas import Replicas
from ..model.kernels import check_attention, check_attention_of, check_sdpa_of
from ..model.placing import check_held
from ..model.quantized.agreed import check_quantized
from ..model.quantized.native import Computation, choose
from ..model.sequence import split_points
from .locate import Located, locate_together
from .mapped import map_rank_file
from .phases import Phases
from .pinned import read_rank_file
from .versions import adapted

__all__ = ["Asked", "Ranks", "Ready", "prepare"]


_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """The arguments of `load`, by their names."""

    place: str
    revision: str | None
    device: str | None
    check_digests: bool
    attn_implementation: str | None
    strategies: ParallelInterface | str | Path
    dp_size: int
    sequence_parallel: bool
    compute: str


@dataclass(frozen=True, slots=True)
class Ranks:
    """This rank, its replica of the model, and the store in which it meets the others."""

    info: RankInfo
    replicas: Replicas
    store: Store


@dataclass(frozen=True, slots=True)
class Ready:
    """The work that this rank has done alone: the model on the meta device, and the tensors that go into it.

    `seal` is the digest of the manifest, which must be equal on all ranks. The sequence is split at `points`.
    """

    folder: Path
    manifest: Manifest
    strategies: ParallelInterface
    device: torch.device
    model: Any
    tensors: dict[str, torch.Tensor]
    quantized: Computation
    points: Any
    seal: str


def prepare(asked: Asked, mesh: DeviceMesh | None, ranks: Ranks, deadline: Deadline, phases: Phases) -> Ready:
    """Do all that needs no other rank: find the folder, read this rank's file, and build the model meanwhile."""
    info, rank = ranks.info, ranks.replicas.rank
    found: Located | None = None
    pool = ThreadPoolExecutor(worker_count(info.local_world_size), thread_name_prefix="reshard")
    try:
        strategies = as_strategies(asked.strategies)
        device = _device_of(mesh, asked.device, info.local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # some kernels and collectives take the current device
        found = locate_together(
            asked.place,
            revision=asked.revision,
            first=info.rank == 0,
            rank=rank,
            world_size=ranks.replicas.size,
            digests=asked.check_digests,
            store=ranks.store,
            deadline=deadline,
        )
        folder, manifest = found.folder, found.manifest
        _check_custom(manifest, strategies)
        check_attention(asked.attn_implementation, device, manifest.dtype)
        seal = digest_of((folder / MANIFEST_NAME).read_bytes())
        arriving = _begin(folder, manifest, rank, device, pool, digests=asked.check_digests)
        phases.end("open")  # from here the file is read while the model is built
        family, config = model_class(folder)
        check_attention_of(family, asked.attn_implementation)
        phases.end("import")
        model = on_meta(family, config, dtype=manifest.dtype, attn_implementation=asked.attn_implementation)
        manifest, difference = adapted(manifest, model)
        if difference and info.rank == 0:
            _log.warning("%s: %s", printable(folder), difference)
        told = quantization_of(model_config(folder))
        check_quantized(manifest, model, told)
        quantized = choose(manifest, model, device, rank, asked.compute)
        quantized.replace(model, told or {})
        check_sdpa_of(model, device)
        points = split_points(model, manifest.hooks, strategies) if asked.sequence_parallel else None
        phases.end("build")
        tensors = arriving()
        check_held(manifest, rank, tensors)
        phases.end("read")
        return Ready(folder, manifest, strategies, device, model, tensors, quantized, points, seal)
    except IntegrityError:
        if found:
            found.damaged([rank_file_name(rank)])
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # report a failure even if the disk hangs


def _device_of(mesh: DeviceMesh | None, wanted: str | None, local_rank: int) -> torch.device:
    """Return the wanted device; with a mesh, one of the mesh's kind."""
    if mesh and wanted and wanted.partition(":")[0] != mesh.device_type:
        raise UsageError(f"the mesh is of {mesh.device_type}, and device is {printable(wanted)}", hint="leave it out")
    return pick_device(wanted or (mesh.device_type if mesh else None), local_rank)


def _check_custom(manifest: Manifest, strategies: ParallelInterface) -> None:
    """Raise BadInputError if a style has another definition here than when the folder was made."""
    used = {*manifest.hooks.values(), *(target.style for target in manifest.parameters if target.style)}
    known = strategies.custom(used)
    for style in sorted(manifest.custom.keys() | known.keys()):
        if manifest.custom.get(style) != known.get(style):
            made, here = (of.get(style, "the built-in one") for of in (manifest.custom, known))
            raise BadInputError(
                f"the folder was made with a style {printable(style)} that is {printable(made)}; here it is"
                f" {printable(here) if style in strategies else 'not known'}",
                hint="give the file that registers it: --strategies FILE.py",
            )


def _begin(
    folder: Path, manifest: Manifest, rank: int, device: torch.device, pool: Executor, *, digests: bool
) -> Callable[[], dict[str, torch.Tensor]]:
    """Begin to map this rank's file, or to read it onto a device. The returned function returns the tensors."""
    path, record = _own_file(folder, manifest, rank), manifest.rank_files[rank]
    if device.type == "cpu":
        return map_rank_file(path, record, pool, digests=digests)
    return read_rank_file(path, record, device, pool, digests=digests)


def _own_file(folder: Path, manifest: Manifest, rank: int) -> Path:
    """Return this rank's file. Other rank files may be absent; a wrong size or an unknown file is an IntegrityError."""
    known = {record.name for record in manifest.rank_files}
    for path in sorted(folder.glob("shard-*.safetensors")):
        if path.name not in known:
            raise IntegrityError(f"{printable(path)}: does not belong to this folder")
    for number, record in enumerate(manifest.rank_files):
        if number == rank or os.path.lexists(folder / record.name):
            written_file(folder, record)
    return written_file(folder, manifest.rank_files[rank])

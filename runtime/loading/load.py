"""Load this rank's own file into a transformers model whose parameters are DTensors."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import PrefixStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from reshard.checkpoint.architecture import model_class, on_meta, quiet_transformers
from reshard.checkpoint.source import MANIFEST_NAME
from reshard.errors import BadInputError, IntegrityError, UsageError
from reshard.files.digest import digest_of
from reshard.files.system import by_errno
from reshard.operations.arguments import checked
from reshard.process import patient_collector, worker_count
from reshard.resharded.layout import rank_file_name
from reshard.resharded.manifest import Manifest
from reshard.resharded.rank_file import written_file
from reshard.storage.stores import as_text
from reshard.strategies.registry import ALL_PARALLEL_STYLES, ParallelInterface, as_strategies
from reshard.text import printable

from ..distributed.agreement import Deadline, agree
from ..distributed.mesh import backend_of, connect, make_mesh, pick_device
from ..distributed.ranks import this_rank
from ..distributed.replicas import TP, on_mesh, side_by_side, span
from ..model.hooks import install_hooks, tp_axis
from ..model.keeping import keep_model
from ..model.kernels import check_attention, check_attention_of, check_sdpa_of, shares_gpu
from ..model.methods import give_method
from ..model.placing import check_held, distribute, fill
from ..model.save import save_pretrained
from ..model.sequence import split_points, split_sequence
from .locate import Located, locate_together
from .mapped import map_rank_file
from .phases import Phases
from .pinned import read_rank_file
from .versions import adapted

__all__ = ["load"]

_log = logging.getLogger(__name__)


@checked
@patient_collector()
def load(
    place: str | Path,
    mesh: DeviceMesh | None = None,
    *,
    device: str | torch.device | None = None,
    revision: str | None = None,
    check_digests: bool = True,
    attn_implementation: str | None = None,
    strategies: ParallelInterface | str | Path = ALL_PARALLEL_STYLES,
    dp_size: int = 1,
    sequence_parallel: bool = False,
    timeout: float = 1800,
) -> Any:
    """Load a resharded folder on every rank of the torchrun job, and return the transformers model.

    `place` is a folder, a Hub repo (`org/name`) or a folder of one (`org/name/tp4`); in one that is none itself, its
    folder `tpN` for N ranks is taken. All ranks load one commit; each fetches its own file and the small ones.

    Parameters are DTensors over the axis `tp` of `mesh`, each holding this rank's part; a layout that DTensor cannot
    express stays a local tensor, and `full_tensor` assembles either. Along the mesh's other axes the model is repeated.
    Without a mesh, one is made over all ranks, for `dp_size` replicas of ranks in a row (see `share`). On CPU the
    tensors are views of the mapped file, so memory is shared with the page cache; on a GPU they share one allocation.
    The forward runs on local tensors. What it took is in `model.reshard_seconds`, part by part in order, for
    `model.reshard_bytes`.

    `model.generate` is one decision of all ranks: called alike on each, it gives the same tokens on each, sampled
    or not (`generate_alike`). `attn_implementation` is transformers'; `sdpa` chooses among torch's kernels. What
    `output_attentions` gives are this rank's heads. `model.to(…)` and its like are refused where they change anything.
    So is what would replace a parameter or a module, and a backward: values can be changed in place.

    With `sequence_parallel`, each rank has only its slice of the sequence between a layer's blocks: activations take
    less memory. Nothing in the files depends on it, since norms are whole on every rank.

    Every rank checks its files, and tells the others before any collective; a failure on one is raised on all.
    `device` is `cpu`, `cuda` (each rank a GPU of its own: the default where there are GPUs) or `cuda:0` (all ranks on
    that one, over gloo). With a mesh it is of the mesh's kind, and the collectives are those of the mesh.
    `timeout` is in seconds, from now until the last rank is done; those that are not are named. `strategies` are those
    of your own that the folder was made with: the Python file that registers them, or what `load_strategies` returned.

    Raises:
        UsageError: the attention implementation, or the kernel that `sdpa` has chosen, is not there for this device,
            dtype or model; or `dp_size` or `device` does not go with the mesh.
        TopologyError: the folder was made for another number of ranks, or a rank did not answer in time.
        BadInputError: sequence parallelism is not for this model.
        IntegrityError: a file is missing or its bytes are not those that were written. With `check_digests`, those of
            `config.json` count too, and of a fetched folder those of all small files.
        VersionError: made by a newer release, for a model the installed transformers does not know, or with another
            transformers whose model has other parameters. Other differences are made right, or told in a line.
    """
    deadline = Deadline.after(timeout)
    info = this_rank()
    if mesh is None:
        replicas = side_by_side(info, dp_size)
    elif dp_size != 1:
        raise UsageError("dp_size is for a load without a mesh: the mesh has its own axes")
    else:
        info, replicas = on_mesh(mesh, info)
    phases = Phases()
    store = connect(info, deadline)
    if mesh is not None:  # other ranks may load on a mesh of their own at the same time
        store = PrefixStore(f"mesh {mesh.mesh.tolist()}", store)
    phases.end("handshake")
    failure: Exception | None = None
    found: Located | None = None
    seal = ""
    pool = ThreadPoolExecutor(worker_count(info.local_world_size), thread_name_prefix="reshard")
    try:
        known = as_strategies(strategies)
        where = _device_of(mesh, device, info.local_rank)
        if where.type == "cuda":
            torch.cuda.set_device(where)  # kernels and collectives without a device of their own go by it
        found = locate_together(
            as_text(place),
            revision=revision,
            first=info.rank == 0,
            rank=replicas.rank,
            world_size=replicas.size,
            digests=check_digests,
            store=store,
            deadline=deadline,
        )
        folder, manifest = found.folder, found.manifest
        _check_custom(manifest, known)
        check_attention(attn_implementation, where, manifest.dtype)
        seal = digest_of((folder / MANIFEST_NAME).read_bytes())
        arriving = _begin(folder, manifest, replicas.rank, where, pool, digests=check_digests)
        phases.end("open")  # from here the file is read while the model is made
        family, config = model_class(folder)
        check_attention_of(family, attn_implementation)
        phases.end("import")
        model = on_meta(family, config, dtype=manifest.dtype, attn_implementation=attn_implementation)
        manifest, difference = adapted(manifest, model)
        if difference and info.rank == 0:
            _log.warning("%s: %s", printable(folder), difference)
        check_sdpa_of(model, where)
        points = split_points(model, manifest.hooks, known) if sequence_parallel else None
        phases.end("build")
        tensors = arriving()
        check_held(manifest, replicas.rank, tensors)
        phases.end("read")
    except Exception as error:  # whatever it is, the others must hear of it before they wait in a collective
        failure = error
        if found and isinstance(error, IntegrityError):
            found.damaged([rank_file_name(replicas.rank)])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a disk that hangs must not keep a failure to itself
    deadline = agree(store, info, failure, deadline, what="loading", value=seal)
    phases.end("agree")
    try:
        backend = backend_of(device, where, info.world_size)
        mesh = mesh or make_mesh(info, where, store, deadline, backend=backend, replicas=dp_size)
        replicas = span(replicas, mesh)
        mesh = mesh if mesh.ndim == 1 else mesh[TP]
        phases.end("mesh")
        fill(model, manifest, tensors, where)
        distribute(model, manifest, mesh, known)
        if manifest.world_size > 1:
            install_hooks(model, manifest.hooks, mesh, manifest.topology, known)
        if points is not None:
            split_sequence(model, points, tp_axis(mesh, manifest.topology))
        _finish(model, folder, mesh)
        model._reshard_replicas = replicas
        give_method(model, "save_pretrained", save_pretrained)  # its own would write this rank's tensors
        keep_model(model)
        phases.end("wrap")
    except Exception as error:
        failure = error
    agree(store, info, failure, deadline, what="connecting")
    phases.end("ready")
    model.reshard_seconds = phases.seconds
    model.reshard_bytes = manifest.rank_files[replicas.rank].size
    return model


def _device_of(mesh: DeviceMesh | None, wanted: str | None, local_rank: int) -> torch.device:
    """The device that is wanted; with a mesh, one of the mesh's kind."""
    if mesh and wanted and wanted.partition(":")[0] != mesh.device_type:
        raise UsageError(f"the mesh is of {mesh.device_type}, and device is {printable(wanted)}", hint="leave it out")
    return pick_device(wanted or (mesh.device_type if mesh else None), local_rank)


def _check_custom(manifest: Manifest, strategies: ParallelInterface) -> None:
    """Every style means here what it meant when the folder was made."""
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
    """Begin to map this rank's file, or to read it onto a device. Call what is returned for the tensors."""
    path, record = _own_file(folder, manifest, rank), manifest.rank_files[rank]
    if device.type == "cpu":
        return map_rank_file(path, record, pool, digests=digests)
    return read_rank_file(path, record, device, pool, digests=digests)


def _own_file(folder: Path, manifest: Manifest, rank: int) -> Path:
    """This rank's file. The other ranks' need not be here, but those that are must have their size, and no more be."""
    known = {record.name for record in manifest.rank_files}
    for path in sorted(folder.glob("shard-*.safetensors")):
        if path.name not in known:
            raise IntegrityError(f"{printable(path)}: does not belong to this folder")
    for number, record in enumerate(manifest.rank_files):
        if number == rank or os.path.lexists(folder / record.name):
            written_file(folder, record)
    return written_file(folder, manifest.rank_files[rank])


def _finish(model: Any, folder: Path, mesh: DeviceMesh) -> None:
    model.name_or_path = str(folder)
    model._tp_size = mesh.size()
    model._device_mesh = mesh
    if model.can_generate() and (folder / "generation_config.json").exists():
        from transformers import GenerationConfig

        try:
            with quiet_transformers():  # each rank would say the same of flags that do not go together
                model.generation_config = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError) as error:
            reason = printable(str(error).partition("\n")[0])
            words = f"{printable(folder / 'generation_config.json')}: not usable: {reason}"
            raise by_errno(error, words, BadInputError) from None
    if model.can_generate() and shares_gpu(mesh):
        model.generation_config.disable_compile = True  # with a static cache, `generate` would compile to CUDA graphs
    if model.can_generate() and mesh.size() > 1:
        from ..generation.in_step import generate_alike

        generate_alike(model, mesh.get_group())
    if _has_unaligned_experts(model):
        model.set_experts_implementation("eager")
    model.eval()


def _has_unaligned_experts(model: nn.Module) -> bool:
    """torch's grouped_mm takes only rows and columns of a multiple of 16 bytes, which a cut can spoil."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return any(p.ndim == 3 and any(size * p.element_size() % 16 for size in p.shape[1:]) for p in local)

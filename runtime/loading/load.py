"""`load`: from a resharded folder to a transformers model whose parameters are DTensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import PrefixStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from reshard.checkpoint.architecture import quiet_transformers
from reshard.errors import BadInputError, UsageError
from reshard.files.system import by_errno
from reshard.operations.arguments import checked
from reshard.process import patient_collector
from reshard.storage.stores import as_text
from reshard.strategies.registry import ALL_PARALLEL_STYLES, ParallelInterface
from reshard.text import printable

from ..distributed.agreement import Deadline, agree
from ..distributed.mesh import backend_of, connect, make_mesh
from ..distributed.ranks import this_rank
from ..distributed.replicas import TP, on_mesh, side_by_side, span
from ..model.hooks import install_hooks, take_last_tokens, tp_axis
from ..model.keeping import keep_model
from ..model.kernels import shares_gpu
from ..model.methods import give_method
from ..model.placing import distribute, fill
from ..model.quantized.native import AUTO, OTHER_LIBRARIES
from ..model.save import save_pretrained
from ..model.sequence import split_sequence
from .phases import Phases
from .prepare import Asked, Ranks, Ready, prepare

__all__ = ["load"]


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
    compute: str = AUTO,
    timeout: float = 1800,
) -> Any:
    """Load a resharded folder on every rank of the torchrun job, and return the transformers model.

    `place` is a resharded folder, a Hub repo (`org/name`) or a folder in one (`org/name/tp4`). If it is not resharded
    itself, its folder `tpN` for N ranks is loaded. All ranks load one commit; each fetches its own file and the small
    files.

    Parameters are DTensors over the axis `tp` of `mesh`, each holding this rank's part. A layout that DTensor cannot
    express stays a local tensor; `full_tensor` assembles either. The model is repeated along the mesh's other axes.
    Without a mesh, one is made over all ranks, for `dp_size` replicas of consecutive ranks (see `share`). On CPU the
    tensors are views of the mapped file, so memory is shared with the page cache; on a GPU they share one allocation.
    The forward runs on local tensors. `model.reshard_seconds` are the load times, part by part in order, and
    `model.reshard_bytes` is the size of this rank's file.

    `model.generate` is one decision of all ranks: called alike on each, it returns the same tokens on each, sampled
    or not (`generate_alike`). `attn_implementation` is transformers'; `sdpa` chooses among torch's kernels.
    `output_attentions` returns this rank's heads. The model refuses `model.to(…)` and its like if they change anything,
    the replacement of a parameter or a module, and a backward. Values can be changed in place.

    With `sequence_parallel`, each rank has only its slice of the sequence between a layer's blocks: activations take
    less memory. The files are the same with and without it, since norms are replicated.

    With `compute` = `native`, the weights of a quantized checkpoint stay quantized, and modules of their library
    compute with them; with `dequantised` they are plain weights in memory. `auto` is native for each weight that the
    library can compute with here; `load_report` says why for the others.

    Every rank checks its files, and tells the others before any collective; a failure on one is raised on all.
    `device` is `cpu`, `cuda` (one GPU for each rank: the default if there are GPUs) or `cuda:0` (all ranks on that
    one, over gloo). With a mesh, it must be of the mesh's kind, and the collectives are the mesh's.
    `timeout` is in seconds, from now until the last rank is done; the error names the ranks that are not.
    `strategies` are the custom strategies that the folder was made with: the Python file that registers them, or what
    `load_strategies` returned.

    Raises:
        UsageError: the attention implementation, or the kernel that `sdpa` has chosen, is not available for this
            device, dtype or model; or `dp_size` or `device` does not go with the mesh; or a weight cannot be computed
            with natively, and `compute` asks for it.
        TopologyError: the folder was made for another number of ranks, or a rank did not answer in time.
        BadInputError: the model cannot use sequence parallelism.
        IntegrityError: a file is missing or its bytes are not those that were written. With `check_digests`, the bytes
            of `config.json` are checked too, and those of all small files if the folder was fetched.
        VersionError: the folder was made by a newer release, for a model that the installed transformers does not
            know, or with another transformers whose model has other parameters. Other differences between
            transformers are adapted, or reported in a line.
    """
    deadline, phases = Deadline.after(timeout), Phases()
    asked = Asked(
        as_text(place),
        revision,
        device,
        check_digests,
        attn_implementation,
        strategies,
        dp_size,
        sequence_parallel,
        compute,
    )
    ranks = _ranks(mesh, dp_size, deadline)
    phases.end("handshake")
    failure: Exception | None = None
    ready: Ready | None = None
    try:
        ready = prepare(asked, mesh, ranks, deadline, phases)
    except Exception as error:  # of any kind: the others must learn of it before they wait in a collective
        failure = error
    deadline = agree(ranks.store, ranks.info, failure, deadline, what="loading", value=ready.seal if ready else "")
    assert ready is not None  # else `agree` has raised
    phases.end("agree")
    try:
        _connect(asked, mesh, ranks, ready, deadline, phases)
    except Exception as error:
        failure = error
    native = ready.quantized.seal()
    agree(ranks.store, ranks.info, failure, deadline, what="connecting", value=native, differing=OTHER_LIBRARIES)
    phases.end("ready")
    model = ready.model
    model.reshard_seconds = phases.seconds
    model.reshard_bytes = ready.manifest.rank_files[ranks.replicas.rank].size
    return model


def _ranks(mesh: DeviceMesh | None, dp_size: int, deadline: Deadline) -> Ranks:
    """Find this rank's place, and meet the others."""
    info = this_rank()
    if mesh is None:
        return Ranks(info, side_by_side(info, dp_size), connect(info, deadline))
    if dp_size != 1:
        raise UsageError("dp_size is for a load without a mesh: the mesh has its own axes")
    info, replicas = on_mesh(mesh, info)
    # Other ranks may load on a mesh of their own at the same time.
    return Ranks(info, replicas, PrefixStore(f"mesh {mesh.mesh.tolist()}", connect(info, deadline)))


def _connect(
    asked: Asked, mesh: DeviceMesh | None, ranks: Ranks, ready: Ready, deadline: Deadline, phases: Phases
) -> None:
    """Put the tensors into the model, and the collectives around its modules."""
    model, manifest = ready.model, ready.manifest
    backend = backend_of(asked.device, ready.device, ranks.info.world_size)
    mesh = mesh or make_mesh(ranks.info, ready.device, ranks.store, deadline, backend=backend, replicas=asked.dp_size)
    replicas = span(ranks.replicas, mesh)
    mesh = mesh if mesh.ndim == 1 else mesh[TP]
    phases.end("mesh")
    fill(model, manifest, ready.tensors, ready.device, ready.quantized)
    distribute(model, manifest, mesh, ready.strategies, ready.quantized)
    if manifest.world_size > 1:
        install_hooks(model, manifest.hooks, model._reshard_targets, mesh, manifest.topology, ready.strategies)
    if ready.points is not None:
        split_sequence(model, ready.points, tp_axis(mesh, manifest.topology))
    take_last_tokens(model)
    _finish(model, ready.folder, mesh)
    ready.quantized.begin(model, tp_axis(mesh, manifest.topology))
    model._reshard_replicas = replicas
    give_method(model, "save_pretrained", save_pretrained)  # transformers' own would write this rank's tensors
    keep_model(model)
    phases.end("wrap")


def _finish(model: Any, folder: Path, mesh: DeviceMesh) -> None:
    model.name_or_path = str(folder)
    model._tp_size = mesh.size()
    model._device_mesh = mesh
    if model.can_generate() and (folder / "generation_config.json").exists():
        from transformers import GenerationConfig

        try:
            with quiet_transformers():  # else every rank would warn of flags that do not go together
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
    """Whether a cut left experts that torch's grouped_mm refuses: rows or columns of no multiple of 16 bytes."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return any(p.ndim == 3 and any(size * p.element_size() % 16 for size in p.shape[1:]) for p in local)

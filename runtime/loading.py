"""Load this rank's own file into a transformers model whose parameters are DTensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from reshard.architecture import KV_GROUPS, meta_model
from reshard.digest import digest_of
from reshard.errors import BadInputError, IntegrityError, TopologyError, printable
from reshard.hub import locate
from reshard.layout import rank_file_name
from reshard.manifest import Manifest, read_manifest
from reshard.placement import Nested, Placement, Replicate, local_shape, pieces
from reshard.source import MANIFEST_NAME, SMALL_FILES, vetted_path
from reshard.strategies import ALL_PARALLEL_STYLES, ParallelInterface, as_dtensor
from reshard.targets import Target

from .hooks import install_hooks
from .mapping import map_rank_file
from .mesh import RankInfo, agree, connect, make_mesh, pick_device, this_rank

__all__ = ["full_tensor", "load"]


def load(
    place: str | Path,
    mesh: DeviceMesh | None = None,
    *,
    device: str | None = None,
    revision: str | None = None,
    check_digests: bool = True,
    attn_implementation: str | None = None,
    strategies: ParallelInterface = ALL_PARALLEL_STYLES,
    timeout: float = 600,
) -> Any:
    """Load a resharded folder (or Hub repo) on every rank of the torchrun job, and return the transformers model.

    Parameters are DTensors over `mesh` (axis `tp`; made here when not given), each holding this rank's part; a layout
    that DTensor cannot express stays a local tensor, and `full_tensor` assembles either. On CPU the tensors are views
    of the mapped file, so memory is shared with the page cache. The forward runs on local tensors.

    Every rank checks its files, and tells the others before any collective; a failure on one is raised on all.
    `timeout` is in seconds.

    Raises:
        TopologyError: the folder was made for another number of ranks.
        IntegrityError: a file is missing or its bytes are not those that were written.
        VersionError: made by a newer release, or for a model the installed transformers does not know.
    """
    if mesh is not None and mesh.ndim != 1:
        raise TopologyError(f"the mesh has {mesh.ndim} axes; give its tp axis alone", hint='mesh["tp"]')
    wait = timedelta(seconds=timeout)
    info = RankInfo(mesh.get_local_rank(), mesh.size(), this_rank().local_rank) if mesh else this_rank()
    store = connect(info, wait)
    failure: Exception | None = None
    seal = ""
    try:
        where = pick_device(mesh.device_type if mesh else device, info.local_rank)
        folder, manifest = _open(place, revision, info)
        _check_custom(manifest, strategies)
        seal = digest_of((folder / MANIFEST_NAME).read_bytes())
        model = meta_model(folder, dtype=manifest.dtype, attn_implementation=attn_implementation)
        path = _own_file(folder, manifest, info.rank)
        tensors = map_rank_file(path, manifest.rank_files[info.rank], check_digests=check_digests)
    except Exception as error:  # whatever it is, the others must hear of it before they wait in a collective
        failure = error
    agree(store, info, failure, wait, what="loading", value=seal)

    mesh = mesh or make_mesh(info, where, store, wait)
    _fill(model, manifest, tensors, where)
    _distribute(model, manifest, mesh, strategies)
    if manifest.world_size > 1:
        install_hooks(model, manifest.hooks, mesh, manifest.topology, strategies)
    _finish(model, folder, mesh)
    return model


def _open(place: str | Path, revision: str | None, info: RankInfo) -> tuple[Path, Manifest]:
    folder, _, _ = locate(str(place), revision=revision, patterns=(*SMALL_FILES, rank_file_name(info.rank)))
    manifest = read_manifest(folder)
    if manifest.world_size != info.world_size:
        raise TopologyError(
            f"{printable(folder)} was made for {manifest.world_size} ranks, not for {info.world_size}",
            hint=f"use torchrun --nproc-per-node {manifest.world_size}, or convert with --tp-size {info.world_size}",
        )
    return folder, manifest


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


def _own_file(folder: Path, manifest: Manifest, rank: int) -> Path:
    """This rank's file. The other ranks' need not be here, but those that are must have their size."""
    for number, record in enumerate(manifest.rank_files):
        path = folder / record.name
        if number == rank and not path.exists():
            raise IntegrityError(f"{printable(path)}: is missing")
        if path.exists() and os.stat(vetted_path(folder, record.name, what="load")).st_size != record.size:
            raise IntegrityError(f"{printable(path)}: expected {record.size} bytes, got {os.stat(path).st_size}")
    return vetted_path(folder, manifest.rank_files[rank].name, what="load")


def _fill(model: Any, manifest: Manifest, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put every local tensor in its place: parameters, then tied ones, then the buffers that no file holds."""
    for target in manifest.parameters:
        local = tensors[target.name].to(device)
        if target.compute_dtype:
            local = local.to(getattr(torch, target.compute_dtype))
        module, own = _owner(model, target.name)
        if own in module._parameters:
            local = module._parameters[own] = nn.Parameter(local, requires_grad=False)
        else:
            module._buffers[own] = local
        local._is_hf_initialized = True
    for name, owner in manifest.tied.items():
        module, own = _owner(model, name)
        source, theirs = _owner(model, owner)
        module._parameters[own] = source._parameters[theirs]
    computed = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    unfinished = {""}
    for name in computed:  # from the configuration, such as rope's frequencies; by its module, or one around it
        module, own = _owner(model, name)
        module._buffers[own] = torch.empty_like(module._buffers[own], device=device)
        unfinished |= {name[:end] for end, character in enumerate(name) if character == "."}
    # Of every other module nothing is left to compute. Some would write to loaded tensors (youtu: the pad row).
    for name, module in model.named_modules():
        module._is_hf_initialized = name not in unfinished
    with torch.no_grad():
        model.initialize_weights()


def _distribute(model: Any, manifest: Manifest, mesh: DeviceMesh, strategies: ParallelInterface) -> None:
    """Make DTensors the parameters' public face, while each module's own forward goes on seeing the local ones.

    The DTensors stand in `module._parameters`, which is what `named_parameters` and `state_dict` read. An attribute in
    the instance's `__dict__` is found before it, at no cost per call.
    """
    targets = {target.name: target for target in manifest.parameters}
    targets |= {name: targets[owner] for name, owner in manifest.tied.items()}
    public: dict[str, nn.Parameter] = {}
    for name, target in targets.items():
        module, own = _owner(model, name)
        local = module._parameters.get(own)
        if local is None:
            continue
        if target.name not in public:
            face = local.detach()
            if target.style is None or strategies.find(target.style).use_dtensor:
                face = as_dtensor(face, target.placement, mesh, target.shape)
            public[target.name] = _as_parameter(face)
        module._parameters[own] = public[target.name]
        module.__dict__[own] = local
    model._reshard_targets = targets
    _share_heads(model, manifest)


def _as_parameter(tensor: torch.Tensor) -> nn.Parameter:
    """`nn.Parameter(tensor)`, less what that costs a DTensor: it detaches, and DTensor works out for each shape how the
    result is sharded, which was half the time of a load. The mark is what `nn.Parameter` puts on such tensors."""
    if isinstance(tensor, DTensor):
        tensor._is_param = True
        return tensor
    return nn.Parameter(tensor, requires_grad=False)


def _share_heads(model: Any, manifest: Manifest) -> None:
    """Where ranks share a KV head, each runs that many times fewer query heads for it than the configuration says."""
    row = manifest.topology.tp_row
    shares = {}
    for target in manifest.parameters:
        placement = target.placement
        if isinstance(placement, Nested) and isinstance(placement.inner, Replicate) and placement.row > row:
            attention = target.name.rpartition(".")[0]
            while attention and not hasattr(model.get_submodule(attention), KV_GROUPS):
                attention = attention.rpartition(".")[0]
            if not attention:
                raise IntegrityError(f"{printable(target.name)}: its heads are shared, but no attention holds it")
            shares[attention] = placement.row // row
    for name, copies in shares.items():
        attention = model.get_submodule(name)
        setattr(attention, KV_GROUPS, getattr(attention, KV_GROUPS) // copies)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own


def _finish(model: Any, folder: Path, mesh: DeviceMesh) -> None:
    model._tp_size = mesh.size()
    model._device_mesh = mesh
    if model.can_generate() and (folder / "generation_config.json").exists():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    if _has_unaligned_experts(model):
        model.set_experts_implementation("eager")
    model.eval()


def _has_unaligned_experts(model: nn.Module) -> bool:
    """torch's grouped_mm takes only rows and columns of a multiple of 16 bytes, which a cut can spoil."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return any(p.ndim == 3 and any(size * p.element_size() % 16 for size in p.shape[1:]) for p in local)


def full_tensor(model: Any, name: str) -> torch.Tensor:
    """The whole of a loaded model's parameter or buffer, assembled on every rank. A collective: call it on all.

    `DTensor.full_tensor()` does the same where the layout has a name in DTensor.
    """
    target: Target = model._reshard_targets[name]
    module, own = _owner(model, name)
    tensor = module._parameters.get(own, module._buffers.get(own))
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if isinstance(target.placement, Replicate):
        return tensor
    return _assemble(tensor, target.placement, target.shape, model._device_mesh)


def _assemble(local: torch.Tensor, placement: Placement, shape: tuple[int, ...], mesh: DeviceMesh) -> torch.Tensor:
    world_size = mesh.size()
    shapes = [local_shape(placement, shape, rank=rank, world_size=world_size) for rank in range(world_size)]
    most = max(torch.Size(s).numel() for s in shapes)
    padded = local.new_zeros(most)
    padded[: local.numel()] = local.detach().flatten()
    parts = [torch.empty_like(padded) for _ in shapes]
    dist.all_gather(parts, padded, group=mesh.get_group())
    whole = local.new_empty(shape)
    for rank, (part, part_shape) in enumerate(zip(parts, shapes)):
        part = part[: torch.Size(part_shape).numel()].view(part_shape)
        for piece in pieces(placement, shape, rank=rank, world_size=world_size):
            there = tuple(slice(s, s + e) for s, e in zip(piece.start, piece.extent))
            here = tuple(slice(s, s + e) for s, e in zip(piece.local_start, piece.extent))
            whole[there] = part[here]
    return whole

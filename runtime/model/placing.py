"""The placing of a rank's tensors in the model: local ones for the forward, DTensors as public parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from reshard.checkpoint.architecture import KV_GROUPS
from reshard.errors import IntegrityError
from reshard.resharded.manifest import Manifest
from reshard.sharding.placement import Nested, Replicate, local_shape
from reshard.strategies import as_dtensor
from reshard.strategies.registry import ParallelInterface
from reshard.text import printable

from .parameters import face_of
from .quantized.native import Computation

__all__ = ["check_held", "distribute", "fill", "owners"]


def check_held(manifest: Manifest, rank: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that a rank's file holds every parameter in the local shape and stored dtype that the manifest gives.

    Raises IntegrityError, naming the tensor."""
    name = manifest.rank_files[rank].name
    for target in manifest.parameters:
        shape = local_shape(target.placement, target.shape, rank=rank, world_size=manifest.world_size)
        found = tensors.get(target.name)
        if found is None or tuple(found.shape) != shape or found.dtype != getattr(torch, target.dtype):
            held = "nothing" if found is None else f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
            raise IntegrityError(
                f"{printable(name)}: tensor {printable(target.name)}: expected {target.dtype} {list(shape)} on rank"
                f" {rank}, got {held}",
                hint="the file and the manifest are not of one conversion: fetch or convert it again",
            )


def fill(
    model: Any, manifest: Manifest, tensors: Mapping[str, torch.Tensor], device: torch.device, quantized: Computation
) -> None:
    """Put every local tensor into the model: parameters, then tied ones, then the buffers that no file holds.

    Raises IntegrityError if the files and config.json do not belong to one model.
    """
    owner = owners(model)
    tensors = quantized.place_tensors(model, tensors)
    for target in manifest.of_model:
        if target.name in quantized.native:
            continue
        local = tensors[target.name].to(device)
        if target.compute_dtype:
            local = local.to(getattr(torch, target.compute_dtype))
        module, own = owner(target.name)
        _check_shape(target.name, target.shape, module, own)
        if own in module._parameters:
            local = module._parameters[own] = nn.Parameter(local, requires_grad=False)
        else:
            module._buffers[own] = local
        local._is_hf_initialized = True
    for name, kept in manifest.tied.items():
        module, own = owner(name)
        source, theirs = owner(kept)
        module._parameters[own] = source._parameters[theirs]
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise IntegrityError(f"{printable(name)}: config.json asks for it, and the rank files do not hold it")
    computed = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    unfinished = {""}
    for name in computed:  # rope's frequencies and the like: the module, or one around it, computes them
        module, own = owner(name)
        module._buffers[own] = torch.empty_like(module._buffers[own], device=device)
        unfinished |= {name[:end] for end, character in enumerate(name) if character == "."}
    # Every other module is complete. Some would overwrite loaded tensors (youtu: the pad row).
    for name, module in model.named_modules():
        module._is_hf_initialized = name not in unfinished
    with torch.no_grad():
        model.initialize_weights()


def _check_shape(name: str, shape: tuple[int, ...], module: nn.Module, own: str) -> None:
    expected = module._parameters.get(own, module._buffers.get(own))
    wanted = None if expected is None else tuple(expected.shape)
    if wanted != shape:
        raise IntegrityError(
            f"{printable(name)}: the rank files hold it as {list(shape)}, and config.json asks for"
            f" {'none' if wanted is None else list(wanted)}"
        )


def distribute(
    model: Any, manifest: Manifest, mesh: DeviceMesh, strategies: ParallelInterface, quantized: Computation
) -> None:
    """Make DTensors the public parameters, while each module's own forward still sees the local tensors.

    The DTensors are in `module._parameters`, which `named_parameters` and `state_dict` read. The local tensors are in
    the instance's `__dict__`, where attributes are looked up first, at no cost per call. A parameter that a library
    computes with stays what the library has.
    """
    targets = {target.name: target for target in manifest.of_model}
    targets |= {name: targets[kept] for name, kept in manifest.tied.items()}
    public: dict[str, nn.Parameter] = {}
    owner = owners(model)
    for name, target in targets.items():
        module, own = owner(name)
        local = module._parameters.get(own)
        if local is None or name in quantized.native:
            continue
        if target.name not in public:
            distributed = local.detach()
            if target.style is None or strategies.find(target.style).use_dtensor:
                distributed = as_dtensor(distributed, target.placement, mesh, target.shape)
            public[target.name] = face_of(local, distributed, target.name)
        module._parameters[own] = public[target.name]
        module.__dict__[own] = local
    model._reshard_targets = targets
    model._reshard_manifest = manifest
    model._reshard_quantized = quantized
    _share_heads(model, manifest, mesh.get_local_rank())


def _share_heads(model: Any, manifest: Manifest, rank: int) -> None:
    """Tell each attention how many query heads this rank has for each KV head, if that is not the model's number."""
    row = manifest.topology.tp_row
    found = {name: groups[rank] for name, groups in manifest.groups.items()}
    for target in manifest.parameters:
        placement = target.placement
        if isinstance(placement, Nested) and isinstance(placement.inner, Replicate) and placement.row > row:
            name = target.name.rpartition(".")[0]
            while name and not hasattr(model.get_submodule(name), KV_GROUPS):
                name = name.rpartition(".")[0]
            if not name:
                raise IntegrityError(f"{printable(target.name)}: its heads are shared, but no attention holds it")
            if name not in found:
                found[name] = getattr(model.get_submodule(name), KV_GROUPS) * row // placement.row
    for name, groups in found.items():
        attention = owners(model)(f"{name}.{KV_GROUPS}")[0]
        if not hasattr(attention, KV_GROUPS):
            raise IntegrityError(f"{printable(name)}: the rank files divide its heads, but it is no attention")
        setattr(attention, KV_GROUPS, groups)


def owners(model: nn.Module) -> Callable[[str], tuple[nn.Module, str]]:
    """Return a function from a parameter's or buffer's name to the module that holds it, and its name there.

    The function raises IntegrityError if the model has no such module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))  # get_submodule walks down from the model every time

    def owner(name: str) -> tuple[nn.Module, str]:
        path, _, own = name.rpartition(".")
        if path not in modules:
            raise IntegrityError(f"{printable(name)}: the rank files hold it, and the model of config.json has none")
        return modules[path], own

    return owner

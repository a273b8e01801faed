"""Hooks that run the forward on local tensors: a style's functions around its modules, no DTensor work per call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from reshard.resharded.targets import Target
from reshard.sharding.placement import Nested, Ranges, Shard, local_shape, offset
from reshard.sharding.topology import Topology
from reshard.strategies import rows_of
from reshard.strategies.base import note_bounds, noted_outputs
from reshard.strategies.registry import ParallelInterface

__all__ = ["install_hooks", "take_last_tokens", "tp_axis"]


def tp_axis(mesh: DeviceMesh, topology: Topology) -> DeviceMesh:
    """Return the ranks that the model is cut over, but for experts. `mesh` has one axis, over a model's ranks.

    Experts may be cut over more ranks than the rest; then a row of ranks has the same part of the rest.
    """
    return mesh if topology.tp_row == 1 else rows_of(mesh, topology.tp_row)["rows"]


def install_hooks(
    model: nn.Module,
    hooks: Mapping[str, str],
    targets: Mapping[str, Target],
    mesh: DeviceMesh,
    topology: Topology,
    strategies: ParallelInterface,
) -> list[Any]:
    """Install each module's style around its forward. `mesh` has one axis, over all ranks. `targets` are the model's
    parameters by name: their placements say where the ranks' parts begin and end.

    Returns the handles; `remove()` takes the functions of each off again.
    """
    handles: list[Any] = []
    tp_mesh = tp_axis(mesh, topology)
    for name, style in hooks.items():
        strategy, module = strategies.find(style), model.get_submodule(name)
        spanned = mesh if strategy.over_all_ranks else tp_mesh
        if spanned.size() == 1:
            continue
        if not strategy.local_forward:  # its forward must see the DTensors, not the local tensors
            for own in module._parameters:
                module.__dict__.pop(own, None)
        _note_bounds(name, module, targets, spanned.size(), mesh.size())
        installed = strategy.prepare_module_tp(module, spanned)
        handles += installed if isinstance(installed, list) else []
    return handles


def _note_bounds(name: str, module: nn.Module, targets: Mapping[str, Target], spanned: int, world_size: int) -> None:
    """Tell a module's style the bounds of its weight's cut, unless they are those that it would take itself: of parts
    of one size, and of all features that the module says it has."""
    for own in ("weight", *sorted(module._parameters.keys() - {"weight"})):  # a library may have no such parameter
        target = targets.get(f"{name}.{own}" if name else own)
        cut = target and (target.placement.outer if isinstance(target.placement, Nested) else target.placement)
        if target is None or not isinstance(cut, (Shard, Ranges)):
            continue
        where = [{"rank": rank, "world_size": world_size} for rank in range(0, world_size, world_size // spanned)]
        starts = [offset(target.placement, target.shape, **at)[cut.dim] for at in where]
        sizes = [local_shape(target.placement, target.shape, **at)[cut.dim] for at in where]
        if len(set(sizes)) > 1 or noted_outputs(module) is not None:
            note_bounds(module, [(start, start + size) for start, size in zip(starts, sizes)])
        return


def take_last_tokens(model: Any) -> None:
    """Let the model's head compute with the last tokens of a prompt at their cost.

    For `hidden_states[:, -1:]` and a weight without gradients, torch 2.13 copies the weight into a batch of its own
    (`should_fold` in `aten::matmul`): that of a 1B llama took 4 s of a prefill. It does not if the strides are those of
    a tensor of this shape alone. `contiguous()` leaves them as they are where sizes are 1.
    """
    head = model.get_output_embeddings() if model.can_generate() else None
    if isinstance(head, nn.Module):
        head.register_forward_pre_hook(lambda _, inputs: (_anew(inputs[0]), *inputs[1:]) if inputs else None)


def _anew(hidden_states: torch.Tensor) -> torch.Tensor:
    if hidden_states.ndim < 3 or hidden_states.stride(0) == hidden_states[0].numel():
        return hidden_states
    return hidden_states.clone(memory_format=torch.contiguous_format)

"""Hooks that run the forward on local tensors: a style's functions around its modules, no DTensor work per call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from reshard.sharding.topology import Topology
from reshard.strategies import rows_of
from reshard.strategies.registry import ParallelInterface

__all__ = ["install_hooks", "tp_axis"]


def tp_axis(mesh: DeviceMesh, topology: Topology) -> DeviceMesh:
    """Return the ranks that the model is cut over, but for experts. `mesh` has one axis, over a model's ranks.

    Experts may be cut over more ranks than the rest; then a row of ranks has the same part of the rest.
    """
    return mesh if topology.tp_row == 1 else rows_of(mesh, topology.tp_row)["rows"]


def install_hooks(
    model: nn.Module, hooks: Mapping[str, str], mesh: DeviceMesh, topology: Topology, strategies: ParallelInterface
) -> list[Any]:
    """Install each module's style around its forward. `mesh` has one axis, over all ranks.

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
        installed = strategy.prepare_module_tp(module, spanned)
        handles += installed if isinstance(installed, list) else []
    return handles

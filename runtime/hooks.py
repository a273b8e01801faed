"""Run the forward on local tensors: each style's functions around its modules, and no DTensor work per call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from reshard.strategies import ParallelInterface

__all__ = ["install_hooks"]


def install_hooks(
    model: nn.Module, hooks: Mapping[str, str], mesh: DeviceMesh, strategies: ParallelInterface
) -> list[Any]:
    """Install each module's style. Returns the handles; `remove()` undoes each.

    A parameter that the style adds itself (a rowwise bias, after the reduction) is hidden from the module's forward.
    """
    handles: list[Any] = []
    for name, style in hooks.items():
        strategy, module = strategies.find(style), model.get_submodule(name)
        for own in strategy.hidden_in_forward:
            if module._parameters.get(own) is not None:
                module.__dict__[f"_hidden_{own}"] = module.__dict__[own]
                module.__dict__[own] = None
        handles += strategy.prepare_module_tp(module, mesh)
    return handles

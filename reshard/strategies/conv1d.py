"""GPT-2's `Conv1D`: a linear layer that stores its weight as `[in, out]`, and adds its bias inside one `addmm`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..sharding import placement as plan
from ..sharding.placement import Placement
from .linear import ColwiseParallel, RowwiseParallel

__all__ = ["Conv1DColwiseParallel", "Conv1DRowwiseParallel"]


class Conv1DColwiseParallel(ColwiseParallel):
    """Output features are split: weight `Shard(1)`, bias `Shard(0)`."""

    features = "nf"

    def placement(self, param_type: str, shape: Sequence[int]) -> Placement:
        return plan.Shard(len(shape) - 1) if shape else plan.Replicate()

    def prepare_module_tp(self, module: nn.Module, device_mesh: DeviceMesh) -> Any:
        handles = super().prepare_module_tp(module, device_mesh)
        module.nf = module.weight.shape[-1]  # its forward gives the output that many features
        return handles


class Conv1DRowwiseParallel(RowwiseParallel):
    """Input features are split: weight `Shard(0)`. `addmm` adds zeros; the bias is added once, after the reduction."""

    def placement(self, param_type: str, shape: Sequence[int]) -> Placement:
        return plan.Shard(0) if len(shape) > 1 else plan.Replicate()

    def prepare_module_tp(self, module: nn.Module, device_mesh: DeviceMesh) -> Any:
        bias = module.bias
        handles = super().prepare_module_tp(module, device_mesh)
        # One element, repeated: torch refuses to write to it, which nothing would hear of.
        module.__dict__["bias"] = bias.new_zeros(()).expand(bias.shape)
        return handles

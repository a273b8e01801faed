"""Convolutions: cut by output channels, which are gathered behind the module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..sharding import placement as plan
from ..sharding.placement import Placement
from .base import LocalLayer, bounds_of
from .collectives import all_gather

__all__ = ["ConvolutionParallel"]

_CHANNELS = "_channel_bounds"  # attribute of a module: each rank's bounds of the output channels


class ConvolutionParallel(LocalLayer):
    """Output channels are split: weight `Shard(0)` (`Shard(1)` if `transposed`), bias `Shard(0)`; they are gathered.

    The convolution must have one group: each output channel then comes from all input channels. Its output has the
    channels before its spatial dims, with or without a batch.
    """

    def __init__(self, *, transposed: bool = False, **layouts: Any) -> None:
        super().__init__(**layouts)
        self.transposed = transposed

    def placement(self, param_type: str, shape: Sequence[int]) -> Placement:
        return plan.Shard(1 if self.transposed and len(shape) > 1 else 0) if shape else plan.Replicate()

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        spatial = mod.weight.ndim - 2
        return all_gather(outputs, outputs.ndim - 1 - spatial, mod.__dict__[_CHANNELS], device_mesh)

    def prepare_module_tp(self, module: nn.Module, device_mesh: DeviceMesh) -> Any:
        size: Any = module.out_channels
        module.__dict__[_CHANNELS] = bounds_of(module, size, device_mesh)
        return super().prepare_module_tp(module, device_mesh)

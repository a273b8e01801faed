"""Modules whose own forward, run on sharded parameters, gives a partial sum."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .base import TensorParallelLayer
from .collectives import all_reduce

__all__ = ["AllReduceParallel", "MoeExpertsParallel", "MoeIdentityParallel"]


class AllReduceParallel(TensorParallelLayer):
    """The module's output is a partial sum: reduce it. Its own parameters are whole unless they have a rule."""

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        return outputs if outputs is None else all_reduce(outputs, device_mesh)


class MoeExpertsParallel(AllReduceParallel):
    """Every rank runs a slice of every expert (`packed_colwise` gate|up, `rowwise` down): reduce the sum."""


class MoeIdentityParallel(TensorParallelLayer):
    """An expert that returns its input, the same on every rank: divided here, since the experts' sum is reduced."""

    @staticmethod
    def _prepare_input_fn(
        input_layouts: Any, desired_input_layouts: Any, mod: nn.Module, inputs: tuple, device_mesh: DeviceMesh
    ) -> tuple:
        return (inputs[0] / device_mesh.size(), *inputs[1:])

"""Modules whose own forward, run on sharded parameters, gives a partial sum."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .base import TensorParallelLayer
from .collectives import all_reduce

__all__ = ["AllReduceParallel", "MoeExpertsParallel"]


class AllReduceParallel(TensorParallelLayer):
    """The module's output is a partial sum: reduce it. Its own parameters are whole unless they have a rule."""

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        return outputs if outputs is None else all_reduce(outputs, device_mesh)


class MoeExpertsParallel(AllReduceParallel):
    """Every rank runs a slice of every expert (`packed_colwise` gate|up, `rowwise` down): reduce the sum."""

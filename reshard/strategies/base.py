"""The base of tensor-parallel strategies: how parameters are cut, and what runs around a module's forward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import Placement as TorchPlacement

from ..sharding import placement as plan
from ..sharding.placement import Placement
from .collectives import Bounds, chunk_bounds
from .shards import as_dtensor, take

__all__ = [
    "LocalLayer",
    "TensorParallelLayer",
    "bounds_of",
    "note_bounds",
    "note_outputs",
    "noted_bounds",
    "noted_outputs",
]

_BOUNDS, _OUTPUTS = "_cut_bounds", "_local_outputs"  # attributes of a module


def note_bounds(module: nn.Module, bounds: Bounds) -> None:
    """Tell a module's style where each rank's slice of the dim that its weight is cut along starts and stops."""
    module.__dict__[_BOUNDS] = bounds


def noted_bounds(module: nn.Module) -> Bounds | None:
    """Return what `note_bounds` told the module."""
    return module.__dict__.get(_BOUNDS)


def note_outputs(module: nn.Module, count: int) -> None:
    """Tell a module's style how many output features this rank has of it, if its weight does not show that: a library
    computes with it."""
    module.__dict__[_OUTPUTS] = count


def noted_outputs(module: nn.Module) -> int | None:
    """Return what `note_outputs` told the module."""
    return module.__dict__.get(_OUTPUTS)


def bounds_of(module: nn.Module, size: int, mesh: DeviceMesh) -> Bounds:
    """Return each rank's bounds along the cut dim, of `size` elements: torch.chunk's, unless others were noted."""
    return noted_bounds(module) or chunk_bounds(size, mesh.size())


class TensorParallelLayer:
    """Base of every strategy; subclass it to make your own.

    Offline, `partition_tensor` returns a rank's part of a parameter. It may only move elements: it runs once for each
    rank, on a tensor that records where they go. At run time `_prepare_input_fn` and `_prepare_output_fn` run before
    and after the module's forward. With `use_dtensor` the module sees its parameters as DTensors there, else as this
    rank's local tensors. If the cut is a plain placement, override `placement` instead, as the built-in strategies do:
    the default `partition_tensor` makes that cut.
    """

    input_layouts: tuple[TorchPlacement, ...] = (Replicate(),)
    desired_input_layouts: tuple[TorchPlacement, ...] = (Replicate(),)
    output_layouts: tuple[TorchPlacement, ...] = (Replicate(),)
    use_local_output = True
    use_dtensor = True
    over_all_ranks = False  # if expert parallelism spans more ranks than tensor parallelism: whether it works on all

    def __init__(
        self,
        *,
        input_layouts: Any = None,
        output_layouts: Any = None,
        use_local_output: bool = True,
        use_dtensor: bool = True,
    ) -> None:
        self.input_layouts = (input_layouts,) if input_layouts else self.input_layouts
        self.output_layouts = (output_layouts,) if output_layouts else self.output_layouts
        self.use_local_output = use_local_output
        self.use_dtensor = use_dtensor

    @property
    def local_forward(self) -> bool:
        """Whether the functions and the module's forward work on local tensors."""
        return not self.use_dtensor

    def placement(self, param_type: str, shape: Sequence[int]) -> Placement:
        """Return the placement of a parameter of the full `shape`. `param_type` is its own name: `weight`, `bias` …"""
        return plan.Replicate()

    def partition_tensor(
        self,
        param: Any,
        empty_param: torch.Tensor,
        param_type: str,
        param_casting_dtype: torch.dtype | None,
        to_contiguous: bool,
        rank: int,
        device_mesh: Any,
    ) -> nn.Parameter:
        """Return `rank`'s part of `param` (a tensor or lazy slice of `empty_param`'s shape) as a Parameter.

        It is a DTensor if `device_mesh` is a real mesh and DTensor has a word for the layout, else the local tensor.
        """
        shape = tuple(empty_param.shape)
        placement = self.placement(param_type, shape)
        local = take(param, placement, shape, rank=rank, world_size=device_mesh.size())
        if param_casting_dtype is not None:
            local = local.to(param_casting_dtype)
        if to_contiguous:
            local = local.contiguous()
        if self.use_dtensor and isinstance(device_mesh, DeviceMesh):
            local = as_dtensor(local, placement, device_mesh, shape)
        return nn.Parameter(local, requires_grad=local.is_floating_point())

    @staticmethod
    def _prepare_input_fn(
        input_layouts: Any, desired_input_layouts: Any, mod: nn.Module, inputs: tuple, device_mesh: DeviceMesh
    ) -> Any:
        return inputs

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        return outputs

    def prepare_module_tp(self, module: nn.Module, device_mesh: DeviceMesh) -> Any:
        """Install the two functions around `module`'s forward. Returns the handles; `remove()` undoes each.

        A function that the strategy does not override is not installed, so it costs nothing.
        """
        handles: list[Any] = []
        if self._prepare_input_fn is not TensorParallelLayer._prepare_input_fn:
            before = partial(self._prepare_input_fn, self.input_layouts, self.desired_input_layouts)
            handles.append(module.register_forward_pre_hook(lambda mod, inputs: before(mod, inputs, device_mesh)))
        if self._prepare_output_fn is not TensorParallelLayer._prepare_output_fn:
            after = partial(self._prepare_output_fn, self.output_layouts, self.use_local_output)
            handles.append(module.register_forward_hook(lambda mod, _, outputs: after(mod, outputs, device_mesh)))
        return handles


class LocalLayer(TensorParallelLayer):
    """A strategy whose functions work on local tensors, so that no call wraps anything.

    `use_dtensor` says only whether others see its parameters as DTensors.
    """

    local_forward = True

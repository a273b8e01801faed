"""Mixtures of experts, and other modules whose output on sharded parameters is a partial sum."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..sharding import placement as plan
from ..sharding.placement import Placement, shard_bounds
from .base import LocalLayer, noted_bounds
from .collectives import all_reduce

__all__ = [
    "AllReduceParallel",
    "ExpertShardParallel",
    "ExpertsDispatchParallel",
    "InterleavedParallel",
    "MoeExpertsParallel",
    "MoeIdentityParallel",
]


class AllReduceParallel(LocalLayer):
    """The module's output (the first, if it has several) is a partial sum: reduce it.

    Its own parameters are replicated unless they have a rule.
    """

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        first = outputs if isinstance(outputs, torch.Tensor) or outputs is None else outputs[0]
        if first is not None:
            all_reduce(first, device_mesh)  # in place, so the outputs hold the sum
        return outputs


class MoeExpertsParallel(AllReduceParallel):
    """Every rank runs a slice of every expert (`packed_colwise` gate|up, `rowwise` down): reduce the output.

    A bias behind the second product is added once: the first rank has it, the others have zeros.
    """

    def prepare_module_tp(self, module: nn.Module, device_mesh: DeviceMesh) -> Any:
        bias: Any = module.__dict__.get("down_proj_bias")
        if bias is not None and device_mesh.get_local_rank() > 0:
            module.__dict__["down_proj_bias"] = bias.new_zeros(()).expand(bias.shape)  # torch refuses to write to it
        return super().prepare_module_tp(module, device_mesh)


class InterleavedParallel(LocalLayer):
    """Gate and up alternate along the last dim: each rank takes its slice of the pairs, which torch.chunk cuts."""

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
        start, stop = shard_bounds(empty_param.shape[-1] // 2, rank=rank, world_size=device_mesh.size())
        local = param[..., 2 * start : 2 * stop]
        return nn.Parameter(local, requires_grad=False)


class MoeIdentityParallel(LocalLayer):
    """An expert that returns its input. Every rank returns the same, so it is divided: the experts' sum is reduced."""

    @staticmethod
    def _prepare_input_fn(
        input_layouts: Any, desired_input_layouts: Any, mod: nn.Module, inputs: tuple, device_mesh: DeviceMesh
    ) -> tuple:
        return (inputs[0] / device_mesh.size(), *inputs[1:])


class ExpertShardParallel(LocalLayer):
    """Whole experts on each rank: every parameter of fused experts is `Shard(0)`."""

    def placement(self, param_type: str, shape: Sequence[int]) -> Placement:
        return plan.Shard(0) if shape else plan.Replicate()


class ExpertsDispatchParallel(AllReduceParallel):
    """Each rank holds some experts (`grouped_gemm`) and runs the routes to them, for all tokens: reduce the output.

    The module's forward takes `(hidden_states, top_k_index, top_k_weights)`. A route to another rank's expert gets
    weight zero, and the id after the last expert, which transformers' experts skip. If they do not, it gets id 0.
    """

    over_all_ranks = True

    @staticmethod
    def _prepare_input_fn(
        input_layouts: Any, desired_input_layouts: Any, mod: nn.Module, inputs: tuple, device_mesh: DeviceMesh
    ) -> tuple:
        hidden_states, top_k_index, top_k_weights = inputs
        first, count = mod._first_expert, mod.num_experts
        elsewhere = (top_k_index < first) | (top_k_index >= first + count)
        index = (top_k_index - first).masked_fill(elsewhere, mod._no_expert)
        return hidden_states, index, top_k_weights.masked_fill(elsewhere, 0)

    def prepare_module_tp(self, module: nn.Module, device_mesh: DeviceMesh) -> Any:
        """Tell the module which experts it has. If experts are cut as well, ranks in a row share the same ones."""
        fused = next(tensor for tensor in vars(module).values() if isinstance(tensor, torch.Tensor) and tensor.ndim > 1)
        everyone, mine = module.num_experts, fused.shape[0]
        rank, noted = device_mesh.get_local_rank(), noted_bounds(module)
        row = device_mesh.size() * mine // everyone
        module.num_experts = mine
        module._first_expert = noted[rank][0] if noted else rank // row * mine
        module._no_expert = mine if _skips_past_the_last(module) else 0
        module._is_expert_parallel = True  # transformers' own sign to skip the id after the last
        return super().prepare_module_tp(module, device_mesh)


def _skips_past_the_last(module: nn.Module) -> bool:
    """Whether the experts' forward knows an id after the last, and runs nothing for it. Not all do. Trying it could end
    a CUDA context, so its source is read. If there is no source, routes to other ranks cost a run here."""
    try:
        source = inspect.getsource(inspect.unwrap(type(module).forward))
    except OSError:
        return False
    return "num_experts + 1" in source and "== self.num_experts" in source

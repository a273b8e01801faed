"""Linear layers: cut by output features (colwise) or by input features (rowwise), plain or packed. Convolutions: cut by
output channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from ..sharding import placement as plan
from ..sharding.placement import PackedShard, Placement, block_sizes
from .base import LocalLayer, bounds_of, noted_bounds
from .collectives import all_gather, all_reduce, largest_only, split
from .sequence import split_sequence_of

__all__ = [
    "FEATURE_BOUNDS",
    "ONLY_ARGMAX",
    "ColwiseParallel",
    "Conv1DColwiseParallel",
    "Conv1DPackedColwiseParallel",
    "Conv1DRowwiseParallel",
    "ConvolutionParallel",
    "PackedColwiseParallel",
    "PackedRowwiseParallel",
    "RowwiseParallel",
]

# Attributes of a module whose output is gathered: each rank's bounds of the features, and whether only the argmax of
# the output is wanted.
FEATURE_BOUNDS, ONLY_ARGMAX = "_feature_bounds", "_only_argmax"

_LAST = Shard(-1)


class ColwiseParallel(LocalLayer):
    """Output features are split: weight `Shard(-2)`, bias `Shard(0)`; the input is replicated.

    The output is this rank's slice of the last dim, or, with `output_layouts=Replicate()`, gathered.
    """

    output_layouts = (_LAST,)
    features = "out_features"  # the module's attribute with the size of that dim

    def placement(self, param_type: str, shape: Sequence[int]) -> Placement:
        return plan.Shard(max(len(shape) - 2, 0)) if shape else plan.Replicate()

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        if not output_layouts[0].is_replicate():
            return outputs
        if mod.__dict__.get(ONLY_ARGMAX):
            return largest_only(outputs, mod._feature_bounds, device_mesh)
        return all_gather(outputs, -1, mod._feature_bounds, device_mesh)

    def prepare_module_tp(self, module: nn.Module, device_mesh: DeviceMesh) -> Any:
        if self.output_layouts[0].is_replicate():
            size = getattr(module, self.features, None) or self._features(module)
            module.__dict__[FEATURE_BOUNDS] = size and bounds_of(module, size, device_mesh)
        return super().prepare_module_tp(module, device_mesh)

    def _features(self, module: nn.Module) -> int | None:
        """Return the size of the cut dim of a module that does not tell it. None if it has no weight: a rule for a
        list of heads matches the list too."""
        noted, weight = noted_bounds(module), module._parameters.get("weight")
        if weight is None or noted:
            return noted[-1][1] if noted else None
        cut: Any = self.placement("weight", weight.shape)
        return weight.shape[cut.dim]  # the parameter is a DTensor: its shape is that of the whole


class RowwiseParallel(LocalLayer):
    """Input features are split: weight `Shard(-1)`; each rank's product is a partial sum, reduced after the forward.

    The bias is replicated and added once, after the reduction. With `input_layouts=Replicate()` the input is replicated
    and each rank takes its slice. If the model's hidden states are split along the sequence, so is the sum.
    """

    input_layouts = (_LAST,)
    desired_input_layouts = (_LAST,)

    def placement(self, param_type: str, shape: Sequence[int]) -> Placement:
        return plan.Shard(len(shape) - 1) if len(shape) > 1 else plan.Replicate()

    @staticmethod
    def _prepare_input_fn(
        input_layouts: Any, desired_input_layouts: Any, mod: nn.Module, inputs: tuple, device_mesh: DeviceMesh
    ) -> tuple:
        if not input_layouts[0].is_replicate():
            return inputs
        bounds = bounds_of(mod, inputs[0].shape[-1], device_mesh)
        return (split(inputs[0], -1, bounds, device_mesh), *inputs[1:])

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        sequence = split_sequence_of(mod)
        outputs = all_reduce(outputs, device_mesh) if sequence is None else sequence.reduced(outputs)
        bias = mod.__dict__.get("_hidden_bias")
        return outputs if bias is None else outputs + bias

    def prepare_module_tp(self, module: nn.Module, device_mesh: DeviceMesh) -> Any:
        if getattr(module, "bias", None) is not None:
            module.__dict__["_hidden_bias"] = module.bias
            module.__dict__["bias"] = None
        return super().prepare_module_tp(module, device_mesh)


class PackedColwiseParallel(LocalLayer):
    """Fused projections (gate|up): each rank takes its slice of every block of the output features.

    The bias is packed as the weight is. Upstream cuts the bias contiguously, which does not match the weight.
    """

    def __init__(self, *, blocks: int | Sequence[int] = 2, **layouts: Any) -> None:
        super().__init__(**layouts)
        self.blocks = blocks

    def placement(self, param_type: str, shape: Sequence[int]) -> Placement:
        if not shape:
            return plan.Replicate()
        dim = max(len(shape) - 2, 0)
        return PackedShard(dim, block_sizes(shape[dim], self.blocks))


class PackedRowwiseParallel(RowwiseParallel):
    """Fused weights packed along the input features."""

    def __init__(self, *, blocks: int | Sequence[int] = 2, **layouts: Any) -> None:
        super().__init__(**layouts)
        self.blocks = blocks

    def placement(self, param_type: str, shape: Sequence[int]) -> Placement:
        if len(shape) < 2:
            return plan.Replicate()
        return PackedShard(len(shape) - 1, block_sizes(shape[-1], self.blocks))


class Conv1DColwiseParallel(ColwiseParallel):
    """Output features are split: weight `Shard(1)`, bias `Shard(0)`."""

    features = "nf"

    def placement(self, param_type: str, shape: Sequence[int]) -> Placement:
        return plan.Shard(len(shape) - 1) if shape else plan.Replicate()

    def prepare_module_tp(self, module: nn.Module, device_mesh: DeviceMesh) -> Any:
        handles = super().prepare_module_tp(module, device_mesh)
        module.nf = module.weight.shape[-1]  # its forward shapes the output by nf
        return handles


class Conv1DPackedColwiseParallel(PackedColwiseParallel):
    """Fused projections (q|k|v): each rank takes its slice of every block of the output features, weight dim 1."""

    def placement(self, param_type: str, shape: Sequence[int]) -> Placement:
        if not shape:
            return plan.Replicate()
        return PackedShard(len(shape) - 1, block_sizes(shape[-1], self.blocks))

    def prepare_module_tp(self, module: nn.Module, device_mesh: DeviceMesh) -> Any:
        handles = super().prepare_module_tp(module, device_mesh)
        module.nf = module.weight.shape[-1]  # its forward shapes the output by nf
        return handles


class Conv1DRowwiseParallel(RowwiseParallel):
    """Input features are split: weight `Shard(0)`. `addmm` adds zeros; the bias is added once, after the reduction."""

    def placement(self, param_type: str, shape: Sequence[int]) -> Placement:
        return plan.Shard(0) if len(shape) > 1 else plan.Replicate()

    def prepare_module_tp(self, module: nn.Module, device_mesh: DeviceMesh) -> Any:
        bias = module.bias
        handles = super().prepare_module_tp(module, device_mesh)
        # One element, repeated: torch refuses to write to it, and a write would otherwise go unnoticed.
        module.__dict__["bias"] = bias.new_zeros(()).expand(bias.shape)
        return handles


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
        bounds, dim = mod.__dict__[_CHANNELS], outputs.ndim - 1 - (mod.weight.ndim - 2)
        start, stop = bounds[device_mesh.get_local_rank()]
        return all_gather(outputs.narrow(dim, 0, stop - start), dim, bounds, device_mesh)

    def prepare_module_tp(self, module: nn.Module, device_mesh: DeviceMesh) -> Any:
        size: Any = module.out_channels
        module.__dict__[_CHANNELS] = bounds_of(module, size, device_mesh)
        for own, local in [(own, module.__dict__.get(own)) for own in module._parameters]:
            if local is not None and 0 in local.shape:  # torch computes no convolution without channels: one of zeros
                module.__dict__[own] = local.new_zeros(()).expand([max(1, extent) for extent in local.shape])
        return super().prepare_module_tp(module, device_mesh)

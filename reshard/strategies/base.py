"""What a tensor-parallel style is: how its parameters are cut, and what its module does around the forward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from ..sharding import placement as plan
from ..sharding.placement import PackedShard, Placement, block_sizes, local_shape, pieces
from ..sharding.regions import contiguous_strides
from .collectives import group_of
from .tracing import traced_placement

__all__ = [
    "LocalLayer",
    "TensorParallelLayer",
    "as_dtensor",
    "get_packed_weights",
    "get_tensor_shard",
    "rows_of",
    "take",
    "torch_placement",
]


def take(param: Any, placement: Placement, shape: Sequence[int], *, rank: int, world_size: int) -> torch.Tensor:
    """The part of `param` (a tensor, or a lazy safetensors slice) that `rank` holds. Any dtype; may be empty."""
    if isinstance(placement, plan.Nested):
        row, place = divmod(rank, placement.row)
        held = take(param, placement.outer, shape, rank=row, world_size=world_size // placement.row)
        return take(held, placement.inner, held.shape, rank=place, world_size=placement.row)
    if not shape:
        return param[...]
    found = [
        param[tuple(slice(start, start + extent) for start, extent in zip(piece.start, piece.extent))]
        for piece in pieces(placement, shape, rank=rank, world_size=world_size)
    ]
    if not found:
        empty = local_shape(placement, shape, rank=rank, world_size=world_size)
        return param[tuple(slice(0, size) for size in empty)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=placement.dim)  # type: ignore[union-attr]


def get_tensor_shard(param: Any, empty_param: torch.Tensor, device_mesh: Any, rank: int, dim: int) -> torch.Tensor:
    """`rank`'s slice of `param` along `dim` (negative counts from the end): torch.chunk's, uneven and empty included.

    `param` is a tensor or a lazy safetensors slice, `empty_param` gives the full shape, `device_mesh.size()` the ranks.
    """
    shape = tuple(empty_param.shape)
    return take(param, plan.Shard(dim % len(shape)), shape, rank=rank, world_size=device_mesh.size())


def get_packed_weights(
    param: Any,
    empty_param: torch.Tensor,
    device_mesh: Any,
    rank: int,
    dim: int,
    blocks: int | Sequence[int] = 2,
) -> torch.Tensor:
    """`rank`'s slice of every block packed along `dim`, concatenated: gate|up by default, or the given blocks.

    `blocks` is their number or their relative sizes. No row is ever dropped: each block is cut as torch.chunk does.
    """
    shape = tuple(empty_param.shape)
    dim %= len(shape)
    packed = PackedShard(dim, block_sizes(shape[dim], blocks))
    return take(param, packed, shape, rank=rank, world_size=device_mesh.size())


def torch_placement(placement: Placement, world_size: int) -> TorchPlacement | None:
    """DTensor's word for a placement on a mesh of one axis, or None where it has none.

    `_StridedShard` describes equal blocks that divide evenly; DTensor cannot express other packed layouts.
    """
    if isinstance(placement, plan.Replicate):
        return Replicate()
    if isinstance(placement, plan.Shard):
        return Shard(placement.dim)
    blocks = placement.blocks if isinstance(placement, PackedShard) else ()
    if blocks and len(set(blocks)) == 1 and blocks[0] % world_size == 0:
        return _StridedShard(placement.dim, split_factor=len(blocks))  # type: ignore[union-attr]
    return None


def as_dtensor(local: torch.Tensor, placement: Placement, mesh: DeviceMesh, shape: Sequence[int]) -> torch.Tensor:
    """A rank's tensor as a DTensor of the global `shape`; `local` itself where DTensor has no word for its layout.

    A nested placement stands on a two-axis view of the mesh. The first such view is made by a collective: call it alike
    on all ranks.
    """
    if isinstance(placement, plan.Nested):
        mesh = rows_of(mesh, placement.row)
        placements = [
            torch_placement(placement.outer, mesh.size(0)),
            torch_placement(placement.inner, placement.row),
        ]
    else:
        placements = [torch_placement(placement, mesh.size())]
    if None in placements:
        return local
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=contiguous_strides(shape)
    )


def rows_of(mesh: DeviceMesh, row: int) -> DeviceMesh:
    """The mesh as two axes, `rows` and `row`: that many ranks in each row. Made once, by a collective of its ranks."""
    views: dict[int, DeviceMesh] = mesh.__dict__.setdefault("_reshard_views", {})
    if row not in views:
        ranks = mesh.mesh.view(-1, row)
        place, column = divmod(mesh.get_local_rank(), row)
        # Other ranks may be on a mesh of their own, with views at other times: each makes only the groups it is in.
        groups = [group_of(own.tolist()) for own in (ranks[:, column], ranks[place])]
        views[row] = DeviceMesh.from_group(groups, mesh.device_type, mesh=ranks, mesh_dim_names=("rows", "row"))
    return views[row]


class TensorParallelLayer:
    """Base of every style; subclass it to make your own.

    Offline, `partition_tensor` gives a rank's part of a parameter; it may only move elements, and is run once for each
    rank on a tensor that records where they go. At run time `_prepare_input_fn` and `_prepare_output_fn` run before
    and after the module's forward. With `use_dtensor` the module sees its parameters as DTensors there, else this
    rank's local tensors. A cut that is a plain placement can be said through `placement` instead, as the built-in
    styles do: the default `partition_tensor` makes it.
    """

    input_layouts: tuple[TorchPlacement, ...] = (Replicate(),)
    desired_input_layouts: tuple[TorchPlacement, ...] = (Replicate(),)
    output_layouts: tuple[TorchPlacement, ...] = (Replicate(),)
    use_local_output = True
    use_dtensor = True
    over_all_ranks = False  # where expert parallelism spans more ranks than tensor parallelism: which it works on

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
        """How a parameter of the full `shape` lies on the ranks. `param_type` is its own name: `weight`, `bias` …"""
        return plan.Replicate()

    def placement_on(self, param_type: str, shape: Sequence[int], dtype: torch.dtype, world_size: int) -> Placement:
        """`placement`, or where `partition_tensor` is the strategy's own, what that makes of the parameter."""
        if type(self).partition_tensor is TensorParallelLayer.partition_tensor:
            return self.placement(param_type, shape)
        return traced_placement(self, param_type, shape, dtype, world_size)

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
        """`rank`'s part of `param` (a tensor or lazy slice of `empty_param`'s shape) as a Parameter.

        A DTensor where `device_mesh` is a real mesh and the layout has a name there, else the local tensor.
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

        A function that a style leaves as it is costs nothing: it is not installed.
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
    """A style whose functions work on local tensors, so that nothing is wrapped at any call.

    `use_dtensor` says only whether its parameters are DTensors to others.
    """

    local_forward = True

"""A rank's part of a tensor: taken by its placement, and described as a DTensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from ..sharding import placement as plan
from ..sharding.placement import PackedShard, Placement, block_sizes, local_shape, pieces
from ..sharding.regions import contiguous_strides
from .collectives import group_of

__all__ = ["as_dtensor", "get_packed_weights", "get_tensor_shard", "rows_of", "take", "torch_placement"]


def take(param: Any, placement: Placement, shape: Sequence[int], *, rank: int, world_size: int) -> torch.Tensor:
    """Return the part of `param` (a tensor, or a lazy safetensors slice) that `rank` holds. Any dtype; may be empty."""
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
    """Return `rank`'s slice of `param` along `dim` (negative counts from the end) as torch.chunk cuts; may be empty.

    `param` is a tensor or lazy safetensors slice, `empty_param` has the full shape, `device_mesh.size()` counts ranks.
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
    """Return `rank`'s slices of all blocks packed along `dim`, concatenated: gate|up by default, or the given blocks.

    `blocks` is their number or their relative sizes. No row is ever dropped: each block is cut as torch.chunk does.
    """
    shape = tuple(empty_param.shape)
    dim %= len(shape)
    packed = PackedShard(dim, block_sizes(shape[dim], blocks))
    return take(param, packed, shape, rank=rank, world_size=device_mesh.size())


def torch_placement(placement: Placement, world_size: int) -> TorchPlacement | None:
    """Return DTensor's word for a placement on a mesh of one axis, or None if it has none.

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
    """Return a rank's tensor as a DTensor of the global `shape`, or `local` if DTensor has no word for its layout.

    A nested placement needs a two-axis view of the mesh. A collective makes the first view of each row size: call this
    alike on all ranks.
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
    """View a mesh as two axes, `rows` and `row`: `row` ranks in each row. Made once, by a collective of its ranks."""
    views: dict[int, DeviceMesh] = mesh.__dict__.setdefault("_reshard_views", {})
    if row not in views:
        ranks = mesh.mesh.view(-1, row)
        place, column = divmod(mesh.get_local_rank(), row)
        # Other ranks may have a mesh of their own, and make views at other times: each makes only the groups it is in.
        groups = [group_of(own.tolist()) for own in (ranks[:, column], ranks[place])]
        views[row] = DeviceMesh.from_group(groups, mesh.device_type, mesh=ranks, mesh_dim_names=("rows", "row"))
    return views[row]

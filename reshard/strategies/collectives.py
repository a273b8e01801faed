"""The collectives the styles need, on local tensors, through c10d. Nothing here changes a tensor's dtype."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..placement import shard_bounds

__all__ = ["all_gather", "all_reduce", "split"]

# torch 2.13 renamed it, and warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_reduce(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Sum over the ranks, in place."""
    if mesh.size() > 1:
        dist.all_reduce(x, group=mesh.get_group())
    return x


def all_gather(x: torch.Tensor, dim: int, size: int, mesh: DeviceMesh) -> torch.Tensor:
    """Join the ranks' slices of `dim`, of `size` elements in all. Ranks may hold less, or nothing."""
    world_size = mesh.size()
    if world_size == 1:
        return x
    dim %= x.ndim
    chunk = -(-size // world_size)
    if x.shape[dim] < chunk:  # later ranks are shorter: what is padded here lies past the end of the joined tensor
        x = torch.nn.functional.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, chunk - x.shape[dim]))
    joined = x.new_empty((world_size, *x.shape))
    _all_gather(joined.view(-1), x.reshape(-1), group=mesh.get_group())
    return joined.movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, size)


def split(x: torch.Tensor, dim: int, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's slice of `dim`."""
    start, stop = shard_bounds(x.shape[dim], rank=mesh.get_local_rank(), world_size=mesh.size())
    return x.narrow(dim, start, stop - start)

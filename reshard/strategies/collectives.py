"""Collectives that the strategies need, on local tensors, through c10d. Nothing here changes a tensor's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..sharding.placement import shard_bounds

__all__ = [
    "Bounds",
    "all_gather",
    "all_reduce",
    "chunk_bounds",
    "group_of",
    "largest_only",
    "reduce_scatter",
    "split",
]

Bounds = Sequence[tuple[int, int]]  # of a dim: where each rank's slice starts and stops

# torch 2.13 renamed them, and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# Bytes, over all ranks. A reduction on gloo goes round the ranks twice, and each step wakes a thread; gathering goes
# round once. Above this size, the bytes that gathering sends in addition cost more than the second round.
_SMALL = 1 << 20


def group_of(ranks: Sequence[int]) -> dist.ProcessGroup:
    """Make a group of these ranks; no other rank takes part.

    If the default group is bound to a GPU, torch splits the new group off its NCCL communicator and waits for all its
    ranks (`_new_process_group_helper`, torch 2.11 to 2.13). So the default group is unbound meanwhile: the new group
    then connects itself through the store, with its first collective.
    """
    world = dist.group.WORLD
    bound, world.bound_device_id = world.bound_device_id, None
    try:
        return dist.new_group(sorted(ranks), use_local_synchronization=True)
    finally:
        world.bound_device_id = bound


@lru_cache(maxsize=1024)
def chunk_bounds(size: int, world_size: int) -> Bounds:
    """Return the bounds of torch.chunk's slices of `size` elements."""
    return tuple(shard_bounds(size, rank=rank, world_size=world_size) for rank in range(world_size))


def all_reduce(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Sum over the ranks, in place. A graph that torch records ends here: no other rank's part is in it."""
    world_size = mesh.size()
    if world_size == 1:
        return x
    if x.requires_grad:
        x = x.detach()
    if x.device.type != "cpu" or x.numel() * x.element_size() * world_size > _SMALL:
        dist.all_reduce(x, group=mesh.get_group())
        return x
    parts = x.new_empty((world_size, *x.shape))
    _all_gather(parts.view(-1), x.reshape(-1), group=mesh.get_group())
    return torch.sum(parts, 0, dtype=x.dtype, out=x)


def all_gather(x: torch.Tensor, dim: int, bounds: Bounds, mesh: DeviceMesh) -> torch.Tensor:
    """Join the ranks' slices of `dim`, which `bounds` lists in order. Ranks may hold less than others, or nothing."""
    world_size = mesh.size()
    if world_size == 1:
        return x
    dim %= x.ndim
    longest = max(stop - start for start, stop in bounds)
    if x.shape[dim] < longest:
        x = torch.nn.functional.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, longest - x.shape[dim]))
    joined = x.new_empty((world_size, *x.shape))
    _all_gather(joined.view(-1), x.reshape(-1), group=mesh.get_group())
    size = bounds[-1][1]
    if all(start == min(rank * longest, size) for rank, (start, _) in enumerate(bounds)):
        return joined.movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, size)  # all padding is behind the last
    return torch.cat([part.narrow(dim, 0, stop - start) for part, (start, stop) in zip(joined, bounds)], dim)


def reduce_scatter(x: torch.Tensor, dim: int, mesh: DeviceMesh) -> torch.Tensor:
    """Sum over the ranks and return torch.chunk's slice of `dim`: the result of `split` after `all_reduce`."""
    world_size = mesh.size()
    if world_size == 1:
        return x
    dim %= x.ndim
    size = x.shape[dim]
    chunk = -(-size // world_size)
    if chunk * world_size > size:
        x = torch.nn.functional.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, chunk * world_size - size))
    parts = x.unflatten(dim, (world_size, chunk)).movedim(dim, 0).contiguous()
    if x.device.type == "cpu":  # gloo reduces all and then cuts, in twice the time
        received = torch.empty_like(parts)
        dist.all_to_all_single(received.view(-1), parts.view(-1), group=mesh.get_group())
        total = torch.sum(received, 0, dtype=x.dtype)
    else:
        total = torch.empty_like(parts[0])
        _reduce_scatter(total.view(-1), parts.view(-1), group=mesh.get_group())
    start, stop = shard_bounds(size, rank=mesh.get_local_rank(), world_size=world_size)
    return total.narrow(dim, 0, stop - start)


def largest_only(x: torch.Tensor, bounds: Bounds, mesh: DeviceMesh) -> torch.Tensor:
    """Return all that argmax needs of `all_gather(x, -1, bounds, mesh)`: zeros of its shape, and a one at its largest.

    Each rank sends 16 bytes for a row. The first of equals is taken, as torch.argmax does.
    """
    start, _ = bounds[mesh.get_local_rank()]
    if x.shape[-1] == 0:  # a later rank may hold nothing
        x = x.new_full((*x.shape[:-1], 1), -torch.inf)
    value, index = x.max(-1)
    mine = torch.stack([value.double(), (index + start).double()])  # both are exact in a double
    found = mine.new_empty((mesh.size(), *mine.shape))
    _all_gather(found.view(-1), mine.view(-1), group=mesh.get_group())
    values, places = found.unbind(1)
    place = places.gather(0, values.argmax(0, keepdim=True))[0].long()
    return x.new_zeros((*x.shape[:-1], bounds[-1][1])).scatter_(-1, place.unsqueeze(-1), 1)


def split(x: torch.Tensor, dim: int, bounds: Bounds, mesh: DeviceMesh) -> torch.Tensor:
    """Return this rank's slice of `dim`."""
    start, stop = bounds[mesh.get_local_rank()]
    return x.narrow(dim, start, stop - start)

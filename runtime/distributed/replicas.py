"""Replicas of a model: which one this rank belongs to, and the group of all their ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from reshard.errors import TopologyError
from reshard.strategies import group_of

from .ranks import RankInfo

__all__ = ["TP", "Replicas", "on_mesh", "side_by_side", "span"]

TP = "tp"  # the axis that a model is cut over


@dataclass(frozen=True, slots=True)
class Replicas:
    """This rank's replica, the `index`-th of `count`, and its place in it, the `rank`-th of `size`.

    `group` holds all ranks of all replicas, once they are connected.
    """

    index: int
    count: int
    rank: int
    size: int
    group: Any = None

    def __deepcopy__(self, _memo: Any) -> Replicas:
        """Return itself: a copy of a model is on the same ranks, and a group cannot be copied."""
        return self


def side_by_side(info: RankInfo, count: int) -> Replicas:
    """Form `count` replicas of consecutive ranks. Raises TopologyError if the ranks do not divide."""
    if count < 1 or info.world_size % count:
        raise TopologyError(
            f"{info.world_size} ranks do not make {count} replicas of equal size",
            hint="use torchrun --nproc-per-node K*N for K replicas of N ranks",
        )
    size = info.world_size // count
    index, rank = divmod(info.rank, size)
    return Replicas(index, count, rank, size)


def on_mesh(mesh: DeviceMesh, info: RankInfo) -> tuple[RankInfo, Replicas]:
    """Return this rank's place on the user's mesh, and its replica. A model is cut over `tp`, and repeated along every
    other axis; over a mesh of one axis it is cut whatever the axis is called.

    Raises TopologyError if the mesh has several axes and none is `tp`, or if this rank is not on it.
    """
    names = mesh.mesh_dim_names or ()
    if mesh.ndim > 1 and TP not in names:
        raise TopologyError(
            f"the mesh has no axis {TP!r}: its axes are {', '.join(names) or 'without names'}",
            hint=f'name the axis to cut over: init_device_mesh(…, mesh_dim_names=("dp", "{TP}"))',
        )
    place = mesh.get_coordinate()
    if place is None:
        raise TopologyError(f"rank {info.rank} is not on the mesh that it loads on")
    axis = names.index(TP) if mesh.ndim > 1 else 0
    index = at = 0
    for number, (where, size) in enumerate(zip(place, mesh.shape)):
        at = at * size + where
        index = index if number == axis else index * size + where
    size = mesh.size(axis)
    return replace(info, rank=at, world_size=mesh.size()), Replicas(index, mesh.size() // size, place[axis], size)


def span(replicas: Replicas, mesh: DeviceMesh) -> Replicas:
    """Return the replicas with the group of all ranks of the mesh. A collective among those ranks."""
    if mesh.size() == dist.get_world_size():
        group = dist.group.WORLD
    elif mesh.ndim == 1:
        group = mesh.get_group()
    else:  # ranks that are not on the mesh take no part
        group = group_of(mesh.mesh.flatten().tolist())
    return replace(replicas, group=group)

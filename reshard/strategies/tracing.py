"""The cut that a strategy makes of a parameter, found by running `partition_tensor` on a tensor that records it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..errors import BadInputError
from ..sharding.placement import Explicit, PackedShard, Piece, Placement, Replicate, Shard, local_shape, pieces
from ..sharding.regions import Region, contiguous_strides
from ..text import printable
from .base import TensorParallelLayer
from .symbolic import NotACopyError, RegionTensor

__all__ = ["placement_on"]


def placement_on(
    strategy: TensorParallelLayer, param_type: str, shape: Sequence[int], dtype: torch.dtype, world_size: int
) -> Placement:
    """Return the placement that a strategy gives a parameter of this shape on `world_size` ranks: its `placement`, or,
    if it overrides `partition_tensor`, the placement that this makes.

    Raises:
        BadInputError: `partition_tensor` computes values, rearranges elements inside a rank, loses some, or fails.
    """
    if type(strategy).partition_tensor is TensorParallelLayer.partition_tensor:
        return strategy.placement(param_type, shape)
    return _traced_placement(strategy, param_type, shape, dtype, world_size)


class _OfflineMesh(DeviceMesh):
    """A mesh of one axis seen from one of its ranks, without a process group."""

    def __init__(self, world_size: int, rank: int) -> None:
        super().__init__("cpu", torch.arange(world_size), mesh_dim_names=("tp",), _init_backend=False, _rank=rank)
        self._place = rank

    def get_local_rank(self, mesh_dim: int | str | None = None) -> int:
        return self._place


def _traced_placement(
    strategy: TensorParallelLayer, param_type: str, shape: Sequence[int], dtype: torch.dtype, world_size: int
) -> Placement:
    """Return the placement that `partition_tensor` makes: a plain one if it equals one, else one box by box."""
    name = type(strategy).__name__
    parts = []
    for rank in range(world_size):
        part = _run(strategy, param_type, tuple(shape), dtype, rank, world_size)
        parts.append((tuple(part.shape), tuple(_piece(region, tuple(shape), name) for region in part.regions)))
    explicit = Explicit(tuple(local for local, _ in parts), tuple(boxes for _, boxes in parts))
    for plain in _plain(shape):
        if _equal(plain, explicit, tuple(shape), world_size):
            return plain
    if not _cover([box for boxes in explicit.boxes for box in boxes], shape):
        raise BadInputError(f"{name}.partition_tensor leaves out elements of {param_type} {list(shape)}")
    return explicit


def _cover(boxes: Sequence[Piece], shape: Sequence[int]) -> bool:
    """Whether every element is in some box. Compares the cells between the boxes' edges, not single elements."""
    edges = [
        sorted({0, size, *(edge for box in boxes for edge in (box.start[d], box.start[d] + box.extent[d]))})
        for d, size in enumerate(shape)
    ]
    held = torch.zeros([max(1, len(cuts) - 1) for cuts in edges], dtype=torch.bool)
    for box in boxes:
        held[
            tuple(slice(cuts.index(at), cuts.index(at + size)) for cuts, at, size in zip(edges, box.start, box.extent))
        ] = True
    return bool(held.all())


def _run(
    strategy: TensorParallelLayer,
    param_type: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rank: int,
    world_size: int,
) -> RegionTensor:
    name = type(strategy).__name__
    whole = RegionTensor.of_source("", shape, dtype)
    empty = torch.empty(shape, dtype=dtype, device="meta")
    try:
        found: Any = strategy.partition_tensor(
            whole, empty, param_type, dtype, True, rank, _OfflineMesh(world_size, rank)
        )
    except NotACopyError as error:
        raise BadInputError(
            f"{name}.partition_tensor computes values ({error}); it may only move elements",
            hint="compute in _prepare_input_fn or _prepare_output_fn",
        ) from None
    except Exception as error:
        raise BadInputError(f"{name}.partition_tensor: {type(error).__name__}: {printable(error)}") from error
    local = found.to_local() if isinstance(found, DTensor) else found
    if not isinstance(local, RegionTensor):
        raise BadInputError(f"{name}.partition_tensor gives new values, not a part of the parameter")
    return local


def _piece(region: Region, shape: tuple[int, ...], name: str) -> Piece:
    """Return a region of the parameter as a box of it. Raises BadInputError if its elements are in another order."""
    strides = contiguous_strides(shape)
    kept = len(region.extent) == len(shape) and all(
        size == 1 or one == other for size, one, other in zip(region.extent, region.strides, strides)
    )
    if not kept:
        raise BadInputError(f"{name}.partition_tensor rearranges elements; it may only cut and concatenate")
    start, left = [], region.offset
    for step in strides:
        start.append(left // step)
        left %= step
    if any(at + size > whole for at, size, whole in zip(start, region.extent, shape)):
        raise BadInputError(f"{name}.partition_tensor reshapes the parameter; it may only cut and concatenate")
    return Piece(tuple(start), region.extent, region.target_start)


def _plain(shape: Sequence[int]) -> Iterator[Placement]:
    yield Replicate()
    for dim, size in enumerate(shape):
        yield Shard(dim)
        if size % 2 == 0:
            yield PackedShard(dim, (size // 2,) * 2)


def _equal(placement: Placement, explicit: Explicit, shape: tuple[int, ...], world_size: int) -> bool:
    where = ({"rank": rank, "world_size": world_size} for rank in range(world_size))
    return all(
        local_shape(placement, shape, **at) == explicit.shapes[at["rank"]]
        and pieces(placement, shape, **at) == explicit.boxes[at["rank"]]
        for at in where
    )

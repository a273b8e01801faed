"""The tensors of the files: parameters with their placement, and each rank's part of them. Frozen data, no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..checkpoint.source import Source
from ..files.dtypes import itemsize, torch_name
from ..sharding.placement import Placement, Replicate, local_shape, offset, pieces
from ..sharding.regions import Region, cut, whole
from ..transforms.bundle import Quantized

__all__ = ["Bundle", "LocalTensor", "Target", "partly_used", "rank_tensors", "unused_tensors"]


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter of the model, and how the rank files hold it.

    `shape` is the global shape, `dtype` the stored one (torch names). `compute_dtype` is what the model wants on load,
    if that differs. `reason` says why a parameter is replicated.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    placement: Placement
    regions: tuple[Region, ...]
    style: str | None = None
    compute_dtype: str | None = None
    reason: str | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A quantized parameter of the model, and how the tensors of the rank files stand for it.

    The files hold the tensors that are the `quantized.members`, and not the parameter itself: the regions of `target`
    are those of matrices that are not in the source files either. Its dtype is the one that the model computes in.
    """

    target: Target
    quantized: Quantized


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """One tensor of one file: its local shape, and the regions that fill it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: tuple[int, ...]  # where its first piece begins in the global tensor
    regions: tuple[Region, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)


def rank_tensors(
    targets: Iterable[Target], *, rank: int, world_size: int, sizes_only: bool = False
) -> tuple[LocalTensor, ...]:
    """Return the tensors of `rank`'s file, in the order of the model; with `sizes_only`, without their regions.

    They are cut from the converted parameters: convert first, then cut.
    """
    return tuple(_local(target, rank, world_size, sizes_only) for target in targets)


def _local(target: Target, rank: int, world_size: int, sizes_only: bool) -> LocalTensor:
    shape = local_shape(target.placement, target.shape, rank=rank, world_size=world_size)
    found = () if sizes_only else pieces(target.placement, target.shape, rank=rank, world_size=world_size)
    if found and isinstance(target.placement, Replicate):
        regions = target.regions  # shared by the ranks
    else:
        regions = tuple(region for piece in found for region in cut(target.regions, piece))
    start = offset(target.placement, target.shape, rank=rank, world_size=world_size)
    return LocalTensor(target.name, shape, target.dtype, start, regions)


def partly_used(source: Source, regions: Iterable[Region]) -> tuple[str, ...]:
    """Return the source tensors that `regions` use only in part, for example without padded rows."""
    taken: Counter[str] = Counter()
    for region in regions:
        taken[region.source] += math.prod(e for e, stride in zip(region.extent, region.strides) if stride or e == 1)
    return tuple(name for name, size in taken.items() if size < math.prod(source.tensors[name].shape))


def unused_tensors(source: Source, names: Iterable[str]) -> tuple[LocalTensor, ...]:
    """Return these source tensors, of which the model takes nothing or only a part, as they are."""
    found = []
    for name in names:
        info = source.tensors[name]
        dtype = torch_name(info.dtype, tensor=name)
        found.append(LocalTensor(name, info.shape, dtype, (0,) * len(info.shape), whole(name, info.shape)))
    return tuple(found)

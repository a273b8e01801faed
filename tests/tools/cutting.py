"""Tensors cut by torch, the oracle of every placement; and tensors compared bit for bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from reshard.resharded.targets import Target, rank_tensors
from reshard.sharding.placement import Placement, Replicate, Shard
from reshard.sharding.regions import whole


def chunk(tensor: torch.Tensor, dim: int, rank: int, world_size: int) -> torch.Tensor:
    """`rank`'s torch.chunk; torch gives fewer chunks than asked for if ranks are empty."""
    parts = torch.chunk(tensor, world_size, dim)
    return parts[rank] if rank < len(parts) else tensor.narrow(dim, 0, 0)


def oracle(tensor: torch.Tensor, placement: Placement, rank: int, world_size: int) -> torch.Tensor:
    """`rank`'s part by torch.chunk, which cuts the tensor or each packed block."""
    if isinstance(placement, Replicate):
        return tensor
    if isinstance(placement, Shard):
        return chunk(tensor, placement.dim, rank, world_size)
    blocks = torch.split(tensor, placement.blocks, placement.dim)
    return torch.cat([chunk(block, placement.dim, rank, world_size) for block in blocks], placement.dim)


BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


DTYPES = [torch.float8_e4m3fn, torch.int8, torch.bool, torch.bfloat16, torch.int64, torch.float32]


def mesh_of(world_size: int) -> Any:
    return SimpleNamespace(size=lambda: world_size)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A tensor of any bit patterns of the dtype, NaNs with payload included."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    width = dtype.itemsize
    raw = torch.randint(0, 256, (torch.Size(shape).numel() * width,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """View the tensor as integers of the same width, so that NaNs compare, in every dtype."""
    return tensor.contiguous().view(BITS[tensor.dtype.itemsize])


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def by_regions(tensor: torch.Tensor, placement: Placement, rank: int, world_size: int) -> torch.Tensor:
    """Make `rank`'s part by the regions that the executor would copy."""
    target = Target("w", tuple(tensor.shape), "any", placement, whole("w", tensor.shape))
    (local,) = rank_tensors([target], rank=rank, world_size=world_size)
    source = bits(tensor).contiguous()
    out = torch.zeros(local.shape, dtype=source.dtype)
    for r in local.regions:
        view = torch.as_strided(source, r.extent, r.strides, r.offset)
        out[tuple(slice(s, s + e) for s, e in zip(r.target_start, r.extent))] = view
    return out.view(tensor.dtype)

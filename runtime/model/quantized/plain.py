"""Quantized parameters as plain ones, made of this rank's part of their tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from reshard.resharded.targets import Bundle
from reshard.transforms.dequantise import dequantised
from reshard.transforms.formats import FORMATS

__all__ = ["plain_part"]


def plain_part(
    bundle: Bundle, tensors: Mapping[str, torch.Tensor], device: torch.device, rank: int, world_size: int
) -> torch.Tensor:
    """Return this rank's part of a quantized parameter on `device`, in the dtype that the model computes in. `tensors`
    are those of the rank, by name. Raises IntegrityError if they make no sense."""
    of, quantized = bundle.target, bundle.quantized
    return dequantised(
        FORMATS[quantized.format],
        quantized,
        of.placement,
        {name: tensors[name].to(device) for name in quantized.members},
        rank=rank,
        world_size=world_size,
        dtype=getattr(torch, of.dtype),
        name=of.name,
    )

"""Assembly of a loaded model's full tensors from all ranks."""

from __future__ import annotations

import difflib
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from reshard.errors import UsageError
from reshard.resharded.targets import Target
from reshard.sharding.placement import Placement, Replicate, local_shape, pieces
from reshard.text import listed, printable

from .keeping import check_views
from .methods import given
from .placing import owners

__all__ = ["full_tensor", "part_of", "whole_of"]


def full_tensor(model: Any, name: str) -> torch.Tensor:
    """Assemble a loaded model's full parameter or buffer on every rank. A collective: call it on all.

    `DTensor.full_tensor()` does the same for layouts that DTensor can express. A quantized parameter is dequantised. If
    its library computes with it, the tensors that the files hold for it have names too. Raises UsageError if the files
    have no such name.
    """
    targets: dict[str, Target] = given(model, "_reshard_targets")
    targets = {**model._reshard_quantized.stored, **targets}
    target = targets.get(name)
    if target is None:
        near = difflib.get_close_matches(name, targets)
        raise UsageError(
            f"the files hold no parameter or buffer {printable(name)}",
            hint=f"near to it: {listed(near)}" if near else "their names are those of model.state_dict()",
        )
    check_views(model)
    return whole_of(part_of(model, name), target, model)


def part_of(model: Any, name: str) -> Any:
    """Return this rank's part of a parameter, a buffer, or a tensor of a quantized parameter."""
    quantized = model._reshard_quantized
    if name in quantized.native:
        return quantized.part(name)
    if name not in model._reshard_targets:
        return quantized.tensors[name]
    module, own = owners(model)(name)
    return module._parameters.get(own, module._buffers.get(own))


def whole_of(tensor: Any, target: Target, model: Any) -> torch.Tensor:
    """Assemble the full tensor of a local parameter or buffer. A collective, unless it is replicated."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if isinstance(target.placement, Replicate):
        return tensor
    return _assemble(tensor, target.placement, target.shape, model._device_mesh)


def _assemble(local: torch.Tensor, placement: Placement, shape: tuple[int, ...], mesh: DeviceMesh) -> torch.Tensor:
    world_size = mesh.size()
    shapes = [local_shape(placement, shape, rank=rank, world_size=world_size) for rank in range(world_size)]
    most = max(torch.Size(s).numel() for s in shapes)
    if local.is_floating_point() and local.element_size() == 1:  # gloo has no word for them
        return _assemble(local.view(torch.uint8), placement, shape, mesh).view(local.dtype)
    padded = local.new_zeros(most)
    padded[: local.numel()] = local.detach().flatten()
    parts = [torch.empty_like(padded) for _ in shapes]
    dist.all_gather(parts, padded, group=mesh.get_group())
    whole = local.new_empty(shape)
    for rank, (part, part_shape) in enumerate(zip(parts, shapes)):
        part = part[: torch.Size(part_shape).numel()].view(part_shape)
        for piece in pieces(placement, shape, rank=rank, world_size=world_size):
            there = tuple(slice(s, s + e) for s, e in zip(piece.start, piece.extent))
            here = tuple(slice(s, s + e) for s, e in zip(piece.local_start, piece.extent))
            whole[there] = part[here]
    return whole

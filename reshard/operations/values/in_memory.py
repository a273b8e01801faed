"""A quantized checkpoint as a plain one, in memory: what a single process computes with."""

from __future__ import annotations

from typing import Any

import torch

from ...checkpoint.naming import Naming
from ...checkpoint.source import Source
from ...execution.reader import SourceReader, tensor_blocks
from ...planning.model.quantized import Matrices
from ...process import BLOCK_BYTES
from ...resharded.derived import Derived
from ...resharded.targets import unused_tensors
from ...sharding.placement import Replicate
from ...transforms.bundle import Quantized, member_of
from ...transforms.dequantise import dequantised

__all__ = ["dequantised_tensors"]


def dequantised_tensors(
    source: Source, model: Any, dtype: torch.dtype, *, derived: Derived | None = None
) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint: each quantized matrix, in `dtype`, and the others as they are. `model` is
    built from its configuration, on any device. If the checkpoint is `derived`, its tensors are computed first.

    Raises:
        BadInputError: a format is not known, or a tensor is missing or does not fit.
        IntegrityError: what a tensor holds makes no sense.
    """
    held = _computed(derived) if derived else _stored(source)
    matrices, wanted = Matrices(source), model.state_dict()
    naming = Naming(model, (source.tensors.keys() - matrices.taken) | set(matrices.names))
    found = {name: tensor for name, tensor in held.items() if name not in matrices.taken}
    for name in matrices.names:
        target, pattern = naming.target(name)
        if target is None:
            continue
        shape = tuple(wanted[target].shape)
        matrix = matrices.matrix(name, shape, is_part=pattern is not None)
        fit = matrix.fit
        shape = fit.size if pattern is not None else shape
        outer = len(shape) - 2
        members, tensors = {}, {}
        for suffix, seen in fit.shapes.items():
            called = matrix.stem + suffix
            members[called] = member_of(fit.roles[suffix], outer)
            tensors[called] = held.pop(called).reshape(seen)
        bundle = Quantized(fit.format.name, fit.options, members, tuple((size,) for size in shape))
        found[name] = dequantised(fit.format, bundle, Replicate(), tensors, dtype=dtype, name=name)
    return found


def _stored(source: Source) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    held: dict[str, torch.Tensor] = {}
    for file in source.files:
        with safe_open(file.path, framework="pt") as opened:
            held |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
    return held


def _computed(derived: Derived) -> dict[str, torch.Tensor]:
    held: dict[str, torch.Tensor] = {}
    scratch = memoryview(bytearray(BLOCK_BYTES))
    with SourceReader(derived.original, computed=derived.computed) as reader:
        for tensor in unused_tensors(derived.source, derived.source.tensors):  # all of them, as they are
            data = bytearray(tensor.nbytes)
            for offset, block in tensor_blocks(tensor, reader, scratch):
                data[offset : offset + len(block)] = block
            dtype = getattr(torch, tensor.dtype)
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            held[tensor.name] = flat.reshape(tensor.shape)
    return held

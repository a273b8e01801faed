"""A quantized checkpoint as a plain one, in memory: what a single process computes with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...checkpoint.naming import Naming
from ...checkpoint.source import Source
from ...execution.reader import SourceReader, tensor_blocks
from ...planning.model.quantized import Matrices, metadata_of
from ...process import BLOCK_BYTES
from ...resharded.derived import Derived
from ...resharded.targets import unused_tensors
from ...sharding.placement import Replicate
from ...transforms.bundle import Quantized, member_of
from ...transforms.dequantise import dequantised
from ...transforms.formats import FORMATS

__all__ = ["Matrix", "dequantised_tensors", "metadata_of", "quantized_matrices", "tensors_of"]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A quantized matrix of a checkpoint: the name that it would have there if it were not quantized, the parameter
    that it is, or is a part of, and its tensors by name."""

    name: str
    parameter: str
    is_part: bool
    bundle: Quantized
    tensors: dict[str, torch.Tensor]


def tensors_of(source: Source, derived: Derived | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint, by name. If it is `derived`, they are computed."""
    return _computed(derived) if derived else _stored(source)


def quantized_matrices(source: Source, model: Any, held: dict[str, torch.Tensor]) -> Iterator[Matrix]:
    """Yield the quantized matrices that a model has, and take their tensors out of `held`, those of the checkpoint.
    `model` is built from its configuration, on any device.

    Raises BadInputError if a format is not known, or a tensor is missing or does not fit.
    """
    matrices, wanted = Matrices(source), model.state_dict()
    naming = Naming(model, (source.tensors.keys() - matrices.taken) | set(matrices.names))
    for name in matrices.names:
        target, pattern = naming.target(name)
        if target is None:
            continue
        shape = tuple(wanted[target].shape)
        matrix = matrices.matrix(name, shape, is_part=pattern is not None)
        fit = matrix.fit
        shape = fit.size if pattern is not None else shape
        members, tensors = {}, {}
        for suffix, seen in fit.shapes.items():
            called = matrix.stem + suffix
            members[called] = member_of(fit.roles[suffix], len(shape) - 2)
            tensors[called] = held.pop(called).reshape(seen)
        bundle = Quantized(fit.format.name, fit.options, members, tuple((size,) for size in shape))
        yield Matrix(name, target, pattern is not None, bundle, tensors)


def dequantised_tensors(
    source: Source, model: Any, dtype: torch.dtype, *, derived: Derived | None = None
) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint: each quantized matrix, in `dtype`, and the others as they are. `model` is
    built from its configuration, on any device. If the checkpoint is `derived`, its tensors are computed first.

    Raises:
        BadInputError: a format is not known, or a tensor is missing or does not fit.
        IntegrityError: what a tensor holds makes no sense.
    """
    held, taken = tensors_of(source, derived), Matrices(source).taken
    found = {name: tensor for name, tensor in held.items() if name not in taken}
    for one in quantized_matrices(source, model, held):
        form, bundle = FORMATS[one.bundle.format], one.bundle
        found[one.name] = dequantised(form, bundle, Replicate(), one.tensors, dtype=dtype, name=one.name)
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

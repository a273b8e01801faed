"""A quantized checkpoint as a plain one, in memory: what a single process computes with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

from ..checkpoint.naming import Naming
from ..checkpoint.source import Source
from ..planning.model.quantized import Matrices, metadata_of
from ..sharding.placement import Replicate
from ..transforms.bundle import Quantized, member_of
from ..transforms.dequantise import dequantised
from ..transforms.formats import FORMATS

__all__ = ["Matrix", "dequantised_tensors", "metadata_of", "quantized_matrices"]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A quantized matrix of a checkpoint: the name that it would have there if it were not quantized, the parameter
    that it is, or is a part of, and its tensors by name."""

    name: str
    parameter: str
    is_part: bool
    bundle: Quantized
    tensors: dict[str, torch.Tensor]


def quantized_matrices(source: Source, model: Any) -> Iterator[Matrix]:
    """Yield the quantized matrices that a model has, one in memory at a time. `model` is built from the checkpoint's
    configuration, on any device.

    Raises BadInputError if a format is not known, or a tensor is missing or does not fit.
    """
    matrices, wanted = Matrices(source), model.state_dict()
    naming = Naming(model, (source.tensors.keys() - matrices.taken) | set(matrices.names))
    with contextlib.ExitStack() as opened:
        files: dict[str, Any] = {}
        for file in source.files:
            handle = opened.enter_context(safe_open(file.path, framework="pt"))
            files |= dict.fromkeys(handle.keys(), handle)
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
                tensors[called] = files[called].get_tensor(called).reshape(seen)
            bundle = Quantized(fit.format.name, fit.options, members, tuple((size,) for size in shape))
            yield Matrix(name, target, pattern is not None, bundle, tensors)


def dequantised_tensors(source: Source, model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint: each quantized matrix, in `dtype`, and the others as they are. `model` is
    that of `quantized_matrices`.

    Raises:
        BadInputError: a format is not known, or a tensor is missing or does not fit.
        IntegrityError: what a tensor holds makes no sense.
    """
    taken = Matrices(source).taken
    found: dict[str, torch.Tensor] = {}
    for file in source.files:
        with safe_open(file.path, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys() if name not in taken}  # noqa: SIM118
    for one in quantized_matrices(source, model):
        form, bundle = FORMATS[one.bundle.format], one.bundle
        found[one.name] = dequantised(form, bundle, Replicate(), one.tensors, dtype=dtype, name=one.name)
    return found

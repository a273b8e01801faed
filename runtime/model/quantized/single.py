"""The single-process model of a quantized checkpoint, with its library's modules: what a rank is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reshard.checkpoint.quantization import quantization_of
from reshard.checkpoint.source import open_source
from reshard.operations.reference import single_model
from reshard.operations.values.in_memory import metadata_of, quantized_matrices, tensors_of
from reshard.resharded.derived import Derived
from reshard.resharded.targets import Target
from reshard.sharding.placement import Replicate

from .interface import Held, Place
from .libraries import BY_FORMAT, LIBRARIES, replace_modules

__all__ = ["computes_otherwise", "native_model", "quantizes_inputs", "shaken"]

_SHAKEN = 2**-16  # of a value: several times what another order of sums changes in fp32


def native_model(
    root: Path,
    dtype: torch.dtype,
    device: torch.device,
    names: Collection[str],
    *,
    derived: Derived | None = None,
) -> Any:
    """Load the checkpoint in `root` in one process, with libraries that compute with the quantized parameters `names`,
    each the weight of a linear layer. If one is `derived` from it, that is loaded. Raises what `single_model` does."""
    model = single_model(root, dtype, device, derived=derived)
    source = derived.source if derived else open_source(root)
    held: dict[str, Held] = {}
    for one in quantized_matrices(source, model, tensors_of(source, derived)):
        if one.parameter in names and not one.is_part:
            kind = str(dtype).removeprefix("torch.")
            target = Target(one.parameter, tuple(map(sum, one.bundle.blocks)), kind, Replicate(), ())
            place = Place(target, one.name, one.bundle, 0, 1, partial(metadata_of, source))
            tensors = {one.bundle.members[name].role: tensor.to(device) for name, tensor in one.tensors.items()}
            held[one.parameter.rpartition(".")[0]] = Held(place, tensors)
    biases = {name: model.get_submodule(name).bias for name in held}
    places = {name: part.place for name, part in held.items()}
    replace_modules(model, places, quantization_of(source.config) or {}, device)
    for name, part in held.items():
        module, library = model.get_submodule(name), BY_FORMAT[part.place.quantized.format]
        library.fill(module, part)
        if biases[name] is not None:
            module._parameters["bias"] = biases[name]
        module.eval()
        library.begin(module, dtype)
    return model


def computes_otherwise(model: Any) -> bool:
    """Whether modules of a model compute something else than dequantised weights do, but for rounding in the model's
    dtype: they quantize what goes into them, or compute in fewer bits."""
    found = {library.computes_in(module) for module in model.modules() for library in LIBRARIES} - {None}
    return quantizes_inputs(model) or any(one.itemsize < model.dtype.itemsize for one in found if one)


def quantizes_inputs(model: Any) -> bool:
    """Whether modules of a model quantize what goes into them."""
    return bool(_quantizing(model))


def _quantizing(model: Any) -> list[nn.Module]:
    return [module for module in model.modules() if any(library.quantizes_inputs(module) for library in LIBRARIES)]


@contextlib.contextmanager
def shaken(model: Any) -> Iterator[None]:
    """A context in which inputs that modules quantize are changed a little, at random, the same each time. What comes
    out then shows how far rounding can move it."""
    generator = torch.Generator().manual_seed(0)

    def shake(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        noise = 1 + _SHAKEN * torch.randn(inputs[0].shape, generator=generator)
        return (inputs[0] * noise.to(inputs[0]), *inputs[1:])

    handles = [module.register_forward_pre_hook(shake) for module in _quantizing(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

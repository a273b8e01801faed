"""The single-process model of a quantized checkpoint, with its library's modules: what a rank is compared with."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reshard.checkpoint.architecture import expected_dtypes, model_class, on_meta, quiet_transformers
from reshard.checkpoint.quantization import quantization_of
from reshard.checkpoint.source import model_config
from reshard.errors import BadInputError
from reshard.files.system import by_errno
from reshard.text import printable

from .libraries import LIBRARIES

__all__ = ["native_model", "quantizes_inputs", "shaken"]

_SHAKEN = 2**-16  # of a value: several times what another order of sums changes in fp32


def native_model(root: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load the checkpoint in `root` with transformers and the library that its quantization needs, in one process.

    Where a library has a kernel that computes in less than `dtype`, it is not used, as on ranks. Raises BadInputError
    if transformers cannot load it.
    """
    family, config = model_class(root)
    loader: Any = family
    plain = on_meta(family, copy.deepcopy(config), dtype=str(dtype).removeprefix("torch."))
    config.quantization_config = quantization_of(model_config(root))
    options = {"config": config, "dtype": dtype, "use_safetensors": True, "device_map": {"": str(device)}}
    try:
        with quiet_transformers():
            model = loader.from_pretrained(root, **options).eval()
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        words = f"{printable(root)}: transformers cannot load it quantized: {printable(error)}"
        raise by_errno(error, words, BadInputError, hint="--compute dequantised compares dequantised weights") from None
    wanted = expected_dtypes(plain, str(dtype).removeprefix("torch."))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:  # transformers leaves them as stored
        if type(tensor) in (nn.Parameter, torch.Tensor) and tensor.is_floating_point() and name in wanted:
            tensor.data = tensor.data.to(wanted[name])
    for module in model.modules():
        for library in LIBRARIES:
            library.begin(module, dtype)
    return model


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

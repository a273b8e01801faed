"""gptqmodel: GPTQ and AWQ by its modules for torch, which run on any device. They are made for this rank's part.

Source: `gptqmodel.nn_modules.qlinear`. Each forward of a module dequantises its weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..interface import Held, Library, Place, mark_quantized

__all__ = ["LIBRARIES"]

_GROUPS = (16, 32, 64, 128)  # sizes that both kinds of modules take
_HALF = ("float16", "bfloat16")


def _refusal(place: Place, device: torch.device) -> str | None:
    group = place.quantized.options["group"]
    if group > 0 and group not in _GROUPS:
        return f"gptqmodel takes no groups of {group}"
    return None


def _refusal_of_awq(place: Place, device: torch.device) -> str | None:
    if place.target.dtype not in _HALF:
        return f"gptqmodel computes AWQ in half precision, and the model is in {place.target.dtype}"
    return _refusal(place, device)


def _replace(model: Any, places: Mapping[str, Place], told: Mapping[str, Any], device: torch.device) -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    for name, place in places.items():
        plain, options = model.get_submodule(name), place.quantized.options
        outputs, inputs = place.local
        kind = AwqTorchLinear if place.quantized.format == "awq" else TorchLinear
        module = kind(
            bits=options.get("bits", 4),
            group_size=options["group"],
            sym=False,  # its zero points are read, whatever they are
            desc_act=options.get("by_activity", False),
            in_features=inputs,
            out_features=outputs,
            bias=False,
            pack_dtype=torch.int32,
            register_buffers=False,
        )
        module.__dict__.pop("bias", None)
        module._buffers.pop("bias", None)
        module.register_parameter("bias", plain.bias)
        model.set_submodule(name, module)
    mark_quantized(model, told)


def _fill_gptq(module: Any, held: Held) -> None:
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    options, tensors, columns = held.options, held.tensors, held.place.local[1]
    group = options["group"] if options["group"] > 0 else columns
    groups = tensors.get(".g_idx")
    if groups is None or not options["by_activity"]:
        in_order = torch.arange(columns, device=tensors[".qweight"].device, dtype=torch.int32) // group
        if groups is not None and not torch.equal(groups.reshape(-1) - groups.min(), in_order):
            raise ValueError("g_idx has groups in another order, and config.json says that they are in order")
        groups = in_order
    elif not 0 <= int(groups.min()) <= int(groups.max()) < len(tensors[".scales"]):
        raise ValueError("g_idx names a group beyond those there are")
    module.register_buffer("qweight", tensors[".qweight"])
    module.register_buffer("qzeros", tensors[".qzeros"].clone())  # they are changed in place
    module.register_buffer("scales", tensors[".scales"])
    module.register_buffer("g_idx", groups.reshape(-1))
    if options["zeros_less_one"]:
        convert_gptq_v1_to_v2_format_module(module, bits=options["bits"], pack_dtype=torch.int32)
    else:
        module.qzero_format(format=2)
    module.optimized = True  # else it compiles a part of itself, at the first forward
    module.post_init()


def _fill_awq(module: Any, held: Held) -> None:
    for role, tensor in held.tensors.items():
        module.register_buffer(role.lstrip("."), tensor)
    module.optimized = True
    module.post_init()


def _tensors(module: Any) -> Iterator[torch.Tensor]:
    yield from (tensor for tensor in module._buffers.values() if tensor is not None)


_COMMON: dict[str, Any] = {
    "name": "gptqmodel",
    "extra": "gptq",
    "packages": ("gptqmodel",),
    "replace": _replace,
    "tensors": _tensors,
}
LIBRARIES = (
    Library(formats=frozenset({"gptq"}), refusal=_refusal, fill=_fill_gptq, **_COMMON),
    Library(formats=frozenset({"awq"}), refusal=_refusal_of_awq, fill=_fill_awq, **_COMMON),
)

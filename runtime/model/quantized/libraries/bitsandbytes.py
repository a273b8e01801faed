"""bitsandbytes: `Linear4bit` and `Linear8bitLt`, on CPU and CUDA. Source: `transformers.integrations.bitsandbytes`.

A 4-bit module takes its shape from the state of its weight, so it computes with a part as with a whole. An int8 module
quantizes each token by its largest input. If a rank has a part of the inputs only, the ranks agree on that first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from reshard.transforms.formats.bitsandbytes import BLOCK, quant_state, unnested

from ...methods import give_method
from ..interface import Held, Library, Place

__all__ = ["LIBRARIES"]

_DEVICES = ("cpu", "cuda")
# Attributes of a module: whether this CPU has a kernel that computes in bf16, whatever is asked of it; and our own.
_FAST, _BIAS = "support_avx512bf16_for_cpu", "_own_bias"
_ROWS = 32  # of a weight: that kernel takes whole numbers of so many


def _refusal(place: Place, device: torch.device) -> str | None:
    if device.type not in _DEVICES:
        return f"bitsandbytes does not compute on {device.type}"
    return None


def _refusal_of_four_bits(place: Place, device: torch.device) -> str | None:
    if place.size[1] % BLOCK:
        return f"a scale is for {BLOCK} values, and some rows are not whole scales"
    return _refusal(place, device)


def _replace(model: Any, places: Mapping[str, Place], told: Mapping[str, Any], device: torch.device) -> None:
    """Let transformers replace all that it takes for quantized, then put the others back."""
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(dict(told), pre_quantized=True)
    before = dict(model.named_modules())
    quantizer.validate_environment(device_map={"": device.type})
    quantizer.preprocess_model(model=model, dtype=model.dtype, device_map={"": device}, checkpoint_files=[])
    replaced = dict(model.named_modules())
    for name, module in before.items():
        if name not in places and replaced.get(name) is not module:
            model.set_submodule(name, module)
            replaced = dict(model.named_modules())
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def _fill_four_bits(module: Any, held: Held) -> None:
    from bitsandbytes.nn import Params4bit

    options, tensors, place = held.options, held.tensors, held.place
    told = quant_state(options, tensors[f".weight.quant_state.bitsandbytes__{options['code']}"], place.size)
    scales = tensors[".weight.absmax"]
    if options["nested"]:
        codes, outer = (tensors[f".weight.nested_{name}"] for name in ("quant_map", "absmax"))
        scales = unnested(scales, _numbers(place, scales), codes, outer, told["nested_offset"])
    state = {
        "absmax": scales.reshape(-1),
        "quant_map": tensors[".weight.quant_map"],
        "quant_type": options["code"],
        "blocksize": BLOCK,
        "dtype": told["dtype"],
        "shape": list(place.local),
    }
    data = tensors[".weight"].reshape(-1, 1)
    module._parameters["weight"] = Params4bit.from_prequantized(data, state, device=data.device, module=module)


def _numbers(place: Place, scales: torch.Tensor) -> torch.Tensor:
    """Return the numbers that this rank's scales have in the whole matrix."""
    numbers = torch.empty(scales.shape, dtype=torch.int64, device=scales.device)
    across, on = place.size[1] // BLOCK, scales.device
    for piece in place.pieces(".weight.absmax"):
        rows, columns = (torch.arange(at, at + size, device=on) for at, size in zip(piece.start, piece.extent))
        here = tuple(slice(start, start + extent) for start, extent in zip(piece.local_start, piece.extent))
        numbers[here] = rows[:, None] * across + columns
    return numbers


def _begin_four_bits(module: Any, dtype: torch.dtype) -> None:
    """Choose what computes, in a module that has been filled."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is None:
        return
    computed = dtype if module.compute_dtype is None else module.compute_dtype
    if module.bias is not None and module.bias.dtype != computed:
        module.__dict__[_BIAS], module.__dict__["bias"] = module.bias, None
        give_method(module, "forward", _with_bias)
    rows, columns = state.shape
    fast = getattr(module, _FAST, False) and computed == torch.bfloat16 and rows % _ROWS == 0
    module.__dict__[_FAST] = fast
    if fast and module.weight.device.type == "cpu":  # the weight gets its layout now, not at the first forward
        with torch.inference_mode():
            type(module).forward(module, torch.zeros(1, columns, dtype=dtype))


def _with_bias(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Compute what `Linear4bit.forward` does. That casts the bias for good, and a loaded model's stays as it is."""
    output = type(module).forward(module, inputs.to(module.compute_dtype))
    return (output + module.__dict__[_BIAS].to(output.dtype)).to(inputs.dtype)


def _fill_int8(module: Any, held: Held) -> None:
    from bitsandbytes.nn import Int8Params

    codes, scales = held.tensors[".weight"], held.tensors[".SCB"].reshape(-1)
    weight = Int8Params(codes, CB=codes, SCB=scales, has_fp16_weights=False, requires_grad=False)
    module._parameters["weight"] = weight
    module.init_8bit_state()


def _reduce_int8(module: Any, mesh: DeviceMesh) -> None:
    give_method(module, "forward", functools.partial(_part_of_int8, mesh=mesh))


def _part_of_int8(module: Any, inputs: torch.Tensor, *, mesh: DeviceMesh) -> torch.Tensor:
    """Compute this rank's part of `Linear8bitLt.forward`, as `bitsandbytes.MatMul8bitLt` of 0.50 does: each token is
    quantized by its largest input on any rank. Inputs above the threshold are not quantized, nor are those of other
    tokens at the same place. The bias comes behind the sum over the ranks."""
    state, flat = module.state, inputs.reshape(-1, inputs.shape[-1])
    half = flat.to(torch.float16)
    large = half.abs() >= state.threshold if state.threshold > 0 else torch.zeros_like(half, dtype=torch.bool)
    quantized = half.masked_fill(large, 0)
    most = quantized.abs().amax(1).float()
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=mesh.get_group())
    codes = torch.round(quantized * (127.0 / most).unsqueeze(-1)).nan_to_num().to(torch.int8)
    if state.threshold > 0:
        columns = torch.argwhere(large.any(0)).view(-1)
        if len(flat) > 1:
            codes[:, columns] = 0
        mixed = torch.ops.bitsandbytes.int8_mixed_scaled_mm
        output, _ = mixed(flat, codes, state.CB, most, state.SCB, columns, None)
    else:
        scaled = torch.ops.bitsandbytes.int8_scaled_mm.default
        output = scaled(codes, state.CB, most, state.SCB, bias=None, dtype=flat.dtype)
    return output.reshape(*inputs.shape[:-1], output.shape[-1])


def _tensors_of_four_bits(module: Any) -> Iterator[torch.Tensor]:
    yield from (module.weight, module.weight.quant_state.absmax)


def _tensors_of_int8(module: Any) -> Iterator[torch.Tensor]:
    yield from (module.state.CB, module.state.SCB)


_COMMON: dict[str, Any] = {"extra": "bnb", "packages": ("bitsandbytes", "accelerate"), "replace": _replace}
LIBRARIES = (
    Library(
        name="bitsandbytes",
        formats=frozenset({"bitsandbytes_4bit"}),
        refusal=_refusal_of_four_bits,
        fill=_fill_four_bits,
        tensors=_tensors_of_four_bits,
        begin=_begin_four_bits,
        computes_in=lambda module: module.compute_dtype if type(module).__name__ == "Linear4bit" else None,
        **_COMMON,
    ),
    Library(
        name="bitsandbytes",
        formats=frozenset({"bitsandbytes_8bit"}),
        refusal=_refusal,
        fill=_fill_int8,
        tensors=_tensors_of_int8,
        reduce=_reduce_int8,
        quantizes_inputs=lambda module: type(module).__name__ == "Linear8bitLt",
        **_COMMON,
    ),
)

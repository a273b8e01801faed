"""Quantized checkpoints, made of plain pico ones: matrix by matrix, with each format's own library where it has one.

`KINDS` has a function for each kind: it takes a matrix [out, in] in fp32, and returns the tensors that stand for it, by
suffix. `CONFIGS` has what config.json then says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from reshard.checkpoint.source import Source
from reshard.files.dtypes import CODES
from reshard.files.header import TensorInfo
from reshard.planning.model.quantized import Matrices
from reshard.transforms.bundle import Quantized, member_of
from reshard.transforms.dequantise import Format

Tensors = dict[str, torch.Tensor]
_FP8 = torch.float8_e4m3fn


def _fp8(
    block: tuple[int, int] | None, suffix: str = ".weight_scale_inv", scales: str = "float"
) -> Callable[[torch.Tensor], Tensors]:
    def quantize(weight: torch.Tensor) -> Tensors:
        rows, columns = block or tuple(weight.shape)
        grid = torch.zeros(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        quantized = torch.empty_like(weight)
        for r in range(grid.shape[0]):
            for c in range(grid.shape[1]):
                part = (slice(r * rows, (r + 1) * rows), slice(c * columns, (c + 1) * columns))
                scale = weight[part].abs().max() / 448
                if scales != "float":
                    scale = torch.exp2(scale.log2().ceil())
                grid[r, c], quantized[part] = scale, weight[part] / scale
        stored = grid if block else grid.reshape(())
        if scales == "e8m0":
            stored = grid.to(torch.float8_e8m0fnu)
        elif scales == "bytes":
            stored = (grid.log2() + 127).to(torch.uint8)
        return {".weight": quantized.to(_FP8), suffix: stored}

    return quantize


def _codes(
    weight: torch.Tensor, group: int, bits: int, *, zero_points: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes from 0 to 2^bits - 1 [out, in], scales [out, groups] in fp16, and zero points [out, groups]."""
    top = (1 << bits) - 1
    groups = weight.unflatten(1, (-1, group))
    if zero_points:
        low, high = groups.amin(-1), groups.amax(-1)
        scales = ((high - low) / top).half()
        zeros = (-low / scales.float()).round().clamp(1, top)
    else:
        scales = (groups.abs().amax(-1) / (top // 2)).half()
        zeros = torch.full_like(scales, (top + 1) // 2, dtype=torch.float32)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, top)
    return codes.flatten(1).int(), scales, zeros.int()


def packed(codes: torch.Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Pack codes into words of 32 bits along a dim, the lowest bits first: as one long run of bits."""
    moved = codes.movedim(dim, -1).to(torch.int64)
    words = torch.zeros(*moved.shape[:-1], moved.shape[-1] * bits // 32 + 1, dtype=torch.int64)
    for element in range(moved.shape[-1]):
        place = element if order is None else element // 8 * 8 + order[element % 8]
        word, shift = divmod(place * bits, 32)
        value = moved[..., element] << shift
        words[..., word] |= value & 0xFFFFFFFF
        words[..., word + 1] |= value >> 32
    words = words[..., : -(-moved.shape[-1] * bits // 32)]
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int().movedim(-1, dim).contiguous()


def _awq(group: int) -> Callable[[torch.Tensor], Tensors]:
    def quantize(weight: torch.Tensor) -> Tensors:
        codes, scales, zeros = _codes(weight, group, 4, zero_points=True)
        places = (0, 4, 1, 5, 2, 6, 3, 7)
        return {
            ".qweight": packed(codes.T, 4, 1, places),
            ".qzeros": packed(zeros.T, 4, 1, places),
            ".scales": scales.T.contiguous(),
        }

    return quantize


def _gptq(group: int, bits: int = 4, *, by_activity: bool = False) -> Callable[[torch.Tensor], Tensors]:
    def quantize(weight: torch.Tensor) -> Tensors:
        width = weight.shape[1] if group < 0 else group
        order = torch.arange(weight.shape[1])
        if by_activity:
            order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(weight.shape[1]))
        codes, scales, zeros = _codes(weight[:, order], width, bits, zero_points=True)
        back = order.argsort()
        return {
            ".qweight": packed(codes[:, back].T, bits, 0),
            ".qzeros": packed(zeros.T - 1, bits, 1),
            ".scales": scales.T.contiguous(),
            ".g_idx": (back // width).int(),
        }

    return quantize


def _four_bits(
    code: str, *, nested: bool = False, storage: torch.dtype = torch.uint8
) -> Callable[[torch.Tensor], Tensors]:
    def quantize(weight: torch.Tensor) -> Tensors:
        from bitsandbytes.functional import quantize_4bit

        data, state = quantize_4bit(
            weight, blocksize=64, compress_statistics=nested, quant_type=code, quant_storage=storage
        )
        return {".weight": data, **{f".weight.{name}": value for name, value in state.as_dict(packed=True).items()}}

    return quantize


def _int8(weight: torch.Tensor) -> Tensors:
    from bitsandbytes.functional import int8_vectorwise_quant

    data, scales, _ = int8_vectorwise_quant(weight.half())
    return {".weight": data, ".SCB": scales, ".weight_format": torch.tensor(0, dtype=torch.uint8)}


def compressed_scheme(**weights: Any) -> Any:
    """Return the scheme of the library for such weights."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


def _compressed(form: str, **weights: Any) -> Callable[[torch.Tensor], Tensors]:
    """Quantize with the library's own compressor, scales found from the largest values."""

    def quantize(weight: torch.Tensor) -> Tensors:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        scheme = compressed_scheme(**weights)
        per, bounds = scheme.weights.strategy, weight
        if per == "block":
            rows, columns = scheme.weights.block_structure
            pad = (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows)
            blocks = torch.nn.functional.pad(weight, pad).unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
            low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        elif per in ("group", "tensor_group"):
            bounds = weight.unflatten(1, (-1, scheme.weights.group_size))
            low, high = bounds.amin(-1), bounds.amax(-1)
        elif per == "channel":
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        else:
            low, high = weight.amin().reshape(1), weight.amax().reshape(1)
        state: Tensors = {"weight": weight}
        whole = None
        if form.startswith("nvfp4"):
            whole = generate_gparam(weight.amin(), weight.amax())
            state["weight_global_scale"] = whole.reshape(1)
        scale, zero = calculate_qparams(low, high, scheme.weights, global_scale=whole)
        state |= {"weight_scale": scale.to(torch.bfloat16) if whole is None else scale, "weight_zero_point": zero}
        made = BaseCompressor.get_value_from_registry(form).compress(state, scheme)
        return {f".{name}": value.contiguous() for name, value in made.items() if value is not None}

    return quantize


def _fbgemm(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {
        ".weight": (weight / scale).to(_FP8),
        ".weight_scale": scale,
        ".input_scale_ub": torch.tensor([1200.0]),
    }


_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _fp4(values: torch.Tensor) -> torch.Tensor:
    """Return the nearest codes, two a byte, the first in the low half."""
    codes = (values.abs()[..., None] - _E2M1).abs().argmin(-1) | ((values < 0).long() << 3)
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def _modelopt(kind: str) -> Callable[[torch.Tensor], Tensors]:
    def quantize(weight: torch.Tensor) -> Tensors:
        inputs = {".input_scale": torch.tensor(0.5)}
        if kind == "fp8":
            scale = weight.abs().max() / 448
            return {".weight": (weight / scale).to(_FP8), ".weight_scale": scale, **inputs}
        groups = weight.unflatten(1, (-1, 16))
        whole = weight.abs().max() / (6 * 448)
        scales = (groups.abs().amax(-1) / 6 / whole).to(_FP8)
        values = groups / (scales.float() * whole)[..., None].clamp(min=1e-12)
        return {
            ".weight": _fp4(values.flatten(1)),
            ".weight_scale": scales,
            ".weight_scale_2": whole,
            **inputs,
        }

    return quantize


def mxfp4(weight: torch.Tensor) -> Tensors:
    """Quantize the experts of gpt-oss, [experts, in, out], into blocks of the transposed matrices."""
    groups = weight.transpose(1, 2).unflatten(2, (-1, 32))
    exponents = (groups.abs().amax(-1) / 6).log2().ceil()
    values = groups / torch.exp2(exponents)[..., None]
    return {"_blocks": _fp4(values), "_scales": (exponents + 127).to(torch.uint8)}  # [experts, out, groups, 16 bytes]


def _groups(form: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": form}},
    }


def _bnb(**told: Any) -> dict[str, Any]:
    return {"quant_method": "bitsandbytes", "llm_int8_skip_modules": None, **told}


_W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": True}
_W4Z = {**_W4, "symmetric": False}
_W8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
_F8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
_F8B = {**_F8, "strategy": "block", "block_structure": [16, 16]}
_NV = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}

# kind → what quantizes a matrix, and what config.json says
Kind = tuple[Callable[[torch.Tensor], Tensors], dict[str, Any]]
KINDS: dict[str, Kind] = {
    "fp8": (_fp8((16, 16)), {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}),
    "fp8_e8m0": (
        _fp8((16, 16), ".scale", "e8m0"),
        {"quant_method": "fp8", "weight_block_size": [16, 16], "scale_fmt": "ue8m0"},
    ),
    "fp8_tensor": (_fp8(None), {"quant_method": "fp8", "weight_block_size": None}),
    "mxfp8": (_fp8((1, 32), scales="bytes"), {"quant_method": "mxfp8", "weight_block_size": [1, 32]}),
    "fbgemm": (_fbgemm, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "nf4": (_four_bits("nf4"), _bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "nf4_nested": (
        _four_bits("nf4", nested=True),
        _bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "fp4_bf16": (
        _four_bits("fp4", storage=torch.bfloat16),
        _bnb(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage="bfloat16"),
    ),
    "int8": (_int8, _bnb(load_in_8bit=True)),
    "awq": (_awq(8), {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True}),
    "gptq": (_gptq(8), {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False}),
    "gptq_8": (_gptq(-1, 8), {"quant_method": "gptq", "bits": 8, "group_size": -1, "desc_act": False}),
    "gptq_order": (
        _gptq(8, by_activity=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True},
    ),
    "ct_w4": (_compressed("pack-quantized", **_W4), _groups("pack-quantized", **_W4)),
    "ct_w4_zero": (_compressed("pack-quantized", **_W4Z), _groups("pack-quantized", **_W4Z)),
    "ct_w8": (_compressed("int-quantized", **_W8), _groups("int-quantized", **_W8)),
    "ct_fp8": (_compressed("float-quantized", **_F8), _groups("float-quantized", **_F8)),
    "ct_fp8_block": (_compressed("float-quantized", **_F8B), _groups("float-quantized", **_F8B)),
    "ct_nvfp4": (_compressed("nvfp4-pack-quantized", **_NV), _groups("nvfp4-pack-quantized", **_NV)),
    "modelopt_fp8": (_modelopt("fp8"), {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "modelopt_nvfp4": (_modelopt("nvfp4"), {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
}


CONFIG_OF_EXPERTS = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
TORCHAO = ("int8", "float8", "intx")


def is_quantized(name: str, tensor: torch.Tensor, kind: object) -> bool:
    """Whether quantizers take a tensor of a plain checkpoint: the matrices of layers, but no router. mxfp4 is for the
    experts of gpt-oss."""
    parts = name.split(".")
    if kind == "mxfp4":
        return tensor.ndim == 3 and "experts" in parts and not name.endswith("bias")
    return tensor.ndim == 2 and name.endswith(".weight") and "layers" in parts and parts[-2] not in ("gate", "router")


def quantize_folder(plain: Path, out: Path, kind: str | Kind) -> Path:
    """Write the checkpoint in `plain` into `out`, quantized: as many files as it has. A kind has a name in KINDS, or is
    given as what they have."""
    shutil.copytree(plain, out)
    if isinstance(kind, tuple):
        quantize, config = kind
    else:
        quantize, config = (mxfp4, CONFIG_OF_EXPERTS) if kind == "mxfp4" else KINDS[kind]
    places: dict[str, str] = {}
    for file in out.glob("*.safetensors"):
        tensors: Tensors = {}
        for name, tensor in load_file(file).items():
            if is_quantized(name, tensor, kind):
                stem = name.removesuffix(".weight")
                tensors |= {stem + suffix: value.contiguous() for suffix, value in quantize(tensor.float()).items()}
            else:
                tensors[name] = tensor
        save_file(tensors, file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
    index = out / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({**json.loads(index.read_text()), "weight_map": places}))
    told = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**told, "quantization_config": config}))
    return out


def quantize_by_torchao(plain: Path, out: Path, kind: str) -> Path:
    """Write the checkpoint in `plain` into `out`, quantized by torchao as transformers loads it: one of TORCHAO."""
    import transformers
    from torchao.quantization import Float8WeightOnlyConfig, Int8DynamicActivationIntxWeightConfig, Int8WeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    how = {
        "int8": lambda: Int8WeightOnlyConfig(version=2),
        "float8": Float8WeightOnlyConfig,
        "intx": lambda: Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=PerGroup(32), version=2
        ),
    }
    config = transformers.TorchAoConfig(how[kind]())
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(out)
    return out


def bundle_of(
    kind: str, tensors: Tensors, shape: tuple[int, ...], name: str = "x.weight"
) -> tuple[Format, Quantized, Tensors]:
    """Return how the tensors that a kind makes of one parameter are understood, and the tensors as they are seen.
    `tensors` are by suffix."""
    stem = name.removesuffix(".weight")
    infos = {
        stem + suffix: TensorInfo(stem + suffix, CODES[str(t.dtype).removeprefix("torch.")], tuple(t.shape), "", 0, 0)
        for suffix, t in tensors.items()
    }
    config = CONFIG_OF_EXPERTS if kind == "mxfp4" else KINDS[kind][1]
    matrix = Matrices(Source(Path(), (), infos, {"quantization_config": config}, ())).matrix(name, shape, is_part=False)
    outer = len(shape) - 2
    members, seen = {}, {}
    for suffix, as_seen in matrix.fit.shapes.items():
        called = matrix.stem + suffix
        members[called] = member_of(matrix.fit.roles[suffix], outer)
        seen[called] = tensors[suffix].reshape(as_seen)
    bundle = Quantized(matrix.fit.format.name, matrix.fit.options, members, tuple((size,) for size in shape))
    return matrix.fit.format, bundle, seen

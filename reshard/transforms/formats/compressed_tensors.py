"""compressed-tensors: integers and fp8 as they are, numbers of 1 to 8 bits packed into words, nvfp4, mxfp4 and mxfp8.

Every group of `config_groups` is a scheme. Which one a module has, its tensors say: their names, dtypes and shapes.
Source: `compressed_tensors.compressors`; values are computed in the dtype of the scales, as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..bundle import ONE, Follows, Role
from ..dequantise import Format, Metadata, Options, Part
from ..numbers import e2m1

METHODS = ("compressed-tensors", "compressed_tensors")
_FLOATS = ("bfloat16", "float16", "float32")
_FP8 = "float8_e4m3fn"
_PLAIN = ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized")
_PER_MATRIX = (Follows(0, ONE), Follows(1, ONE))
# What quantizes activations: kept, and not needed to dequantise.
_ACTIVATIONS = tuple(
    Role(name, (*_FLOATS, "int8", "int32", "int64", "uint8", _FP8), _PER_MATRIX, needed=False)
    for name in (".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point", ".input_global_scale")
)


def _schemes(config: Mapping[str, Any], formats: Sequence[str]) -> list[dict[str, Any]]:
    """Return the options of the groups that have one of `formats`."""
    found = []
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        form = isinstance(group, dict) and (group.get("format") or config.get("format"))
        if not isinstance(weights, dict) or form not in formats:
            continue
        found.append(
            {
                "bits": weights.get("num_bits", 8),
                "kind": weights.get("type", "int"),
                "per": weights.get("strategy") or ("group" if (weights.get("group_size") or 0) > 0 else "tensor"),
                "group": weights.get("group_size"),
                "block": weights.get("block_structure"),
                "symmetric": weights.get("symmetric", True),
                "by_activity": weights.get("actorder") in (True, "group"),
                "exponents": form in ("mxfp8-quantized", "mxfp4-pack-quantized"),
            }
        )
    return found


def _plain_options(config: Mapping[str, Any], metadata: Metadata) -> Sequence[Options]:
    return [one for one in _schemes(config, _PLAIN) if one["bits"] in (4, 8)]


def _packed_options(config: Mapping[str, Any], metadata: Metadata) -> Sequence[Options]:
    """A group in an order of activity has `g_idx`, unless the order was undone when it was saved."""
    found = [one for one in _schemes(config, ("pack-quantized",)) if 1 <= one["bits"] <= 8]
    return [*found, *({**one, "by_activity": False} for one in found if one["by_activity"])]


def _fp4_options(config: Mapping[str, Any], metadata: Metadata) -> Sequence[Options]:
    return _schemes(config, ("nvfp4-pack-quantized", "mxfp4-pack-quantized"))


def _scaled(options: Options) -> tuple[Follows, Follows]:
    """Return what the dims of the scales follow."""
    per, group = options["per"], options["group"]
    if per == "tensor":
        return _PER_MATRIX
    if per == "block":
        rows, columns = options["block"]
        return Follows(0, rows), Follows(1, columns)
    return Follows(0), Follows(1, group if group and group > 0 else ONE)


def _plain_roles(options: Options, size: tuple[int, int] | None) -> Sequence[Role]:
    scaled = _scaled(options)
    return (
        Role(".weight", (_FP8,) if options["kind"] == "float" else ("int8",), (Follows(0), Follows(1))),
        Role(".weight_scale", ("uint8",) if options["exponents"] else _FLOATS, scaled),
        Role(".weight_zero_point", ("int8", _FP8), scaled, needed=not options["symmetric"]),
        *_ACTIVATIONS,
    )


def _packed_roles(options: Options, size: tuple[int, int] | None) -> Sequence[Role]:
    unit, width = _words(options["bits"])
    rows, columns = _scaled(options)
    by_activity = options["by_activity"]
    if by_activity and columns.unit != ONE and size:
        columns = Follows(1, ONE, width=-(-size[1] // columns.unit))
    return (
        Role(".weight_packed", ("int32",), (Follows(0), Follows(1, unit, width))),
        Role(".weight_scale", _FLOATS, (rows, columns)),
        Role(".weight_shape", ("int64", "int32"), None, (2,)),
        Role(
            ".weight_zero_point",
            ("int32",),
            (Follows(0, unit, width) if rows.unit == 1 else rows, columns),
            needed=not options["symmetric"],
        ),
        *((Role(".weight_g_idx", ("int32", "int64"), (Follows(1), Follows(0, ONE))),) if by_activity else ()),
        *_ACTIVATIONS,
    )


def _words(bits: int) -> tuple[int, int]:
    """Return how many values are in how many words of 32 bits, where no value is in two entries."""
    return (32 // bits, 1) if 32 % bits == 0 else (32, bits)


def _plain_values(options: Options, parts: Mapping[str, Part]) -> torch.Tensor:
    scale, zero = parts[".weight_scale"].each(), parts.get(".weight_zero_point")
    if options["exponents"]:
        scale = torch.exp2(scale.float() - 127).to(torch.bfloat16)
    numbers = parts[".weight"].each().to(scale.dtype)
    if zero is not None:
        numbers = numbers - zero.each().to(scale.dtype)
    return numbers * scale


def _packed_values(options: Options, parts: Mapping[str, Part]) -> torch.Tensor:
    bits, packed, zero = options["bits"], parts[".weight_packed"], parts.get(".weight_zero_point")
    told = parts[".weight_shape"].tensor.flatten().tolist()
    if told != list(packed.size):
        raise ValueError(f"weight_shape is {told}, and the matrix is {list(packed.size)}")
    codes = packed.unpacked(bits, 1)
    least = 1 << bits - 1
    scale = parts[".weight_scale"].each()
    zeros = zero.unpacked(bits, 0) - least if zero is not None else None
    if options["by_activity"]:
        chosen = parts[".weight_g_idx"].each().reshape(-1).long()
        if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < scale.shape[1]:
            raise ValueError(f"weight_g_idx names a group beyond the {scale.shape[1]} there are")
        scale = scale[:, chosen]
        zeros = zeros if zeros is None else zeros[:, chosen]
    numbers = (codes - least).to(scale.dtype)
    return (numbers if zeros is None else numbers - zeros.to(scale.dtype)) * scale


def _fp4_roles(options: Options, size: tuple[int, int] | None) -> Sequence[Role]:
    exponents = options["exponents"]
    return (
        Role(".weight_packed", ("uint8",), (Follows(0), Follows(1, 2))),
        Role(
            ".weight_scale",
            ("uint8",) if exponents else (_FP8,),
            (Follows(0), Follows(1, options["group"] or (32 if exponents else 16))),
        ),
        *(() if exponents else (Role(".weight_global_scale", ("float32",), _PER_MATRIX),)),
        *_ACTIVATIONS,
    )


def _fp4_values(options: Options, parts: Mapping[str, Part]) -> torch.Tensor:
    numbers, scale = e2m1(parts[".weight_packed"].unpacked(4, 1)), parts[".weight_scale"].each().float()
    if options["exponents"]:
        return numbers * torch.exp2(scale - 127)
    return numbers * (scale / parts[".weight_global_scale"].each())


FORMATS = (
    Format("compressed", ".weight", _plain_options, _plain_roles, _plain_values),
    Format("compressed_packed", ".weight", _packed_options, _packed_roles, _packed_values),
    Format("compressed_fp4", ".weight", _fp4_options, _fp4_roles, _fp4_values),
)

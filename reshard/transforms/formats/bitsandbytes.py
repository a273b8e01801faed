"""bitsandbytes: 4 bits (nf4 or fp4, with scales that may be quantized themselves) and int8.

The 4-bit values are in one run through the whole matrix, the first of two in the high half of a byte, and each 64 of
them have a scale. If a row is not whole blocks, blocks go from one row into the next, and every rank holds all scales.
Source: `bitsandbytes.functional`, `QuantState`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..bundle import ONE, Follows, Role
from ..dequantise import Format, Metadata, Options, Part
from ..numbers import CODES_OF_BNB

__all__ = ["BLOCK", "FORMATS", "METHODS", "quant_state", "unnested"]

METHODS = ("bitsandbytes",)
BLOCK, _NESTED_BLOCK = 64, 256  # values of a scale, scales of an outer scale
_STORAGES = {1: ("uint8", "int8"), 2: ("bfloat16", "float16"), 4: ("float32",)}  # by the bytes of an element
_BLOB_LIMIT = 4096  # bytes
_PER_ROW = 7.874015718698502e-3  # 1 / 127, as `int8_vectorwise_dequant` has it


def _four_bits(config: Mapping[str, Any], metadata: Metadata) -> Sequence[Options]:
    if not config.get("load_in_4bit", config.get("_load_in_4bit")):
        return []
    kind = config.get("bnb_4bit_quant_type", "fp4")
    nested = bool(config.get("bnb_4bit_use_double_quant"))
    return [{"code": kind, "nested": nested, "storage": size} for size in _STORAGES] if kind in CODES_OF_BNB else []


def _roles(options: Options, size: tuple[int, int] | None) -> Sequence[Role]:
    storage, nested = options["storage"], options["nested"]
    rows, columns = size or (BLOCK, BLOCK)
    values = rows * columns
    stored = (-(-values // (2 * storage)),)
    in_rows = columns % BLOCK == 0
    return (
        Role(
            ".weight.absmax",
            ("uint8",) if nested else ("float32",),
            (Follows(0), Follows(1, BLOCK)) if in_rows else None,
            (-(-values // BLOCK),),
        ),
        Role(
            ".weight",
            _STORAGES[storage],
            (Follows(0), Follows(1, 2 * storage)) if columns % (2 * storage) == 0 else None,
            stored,
        ),
        Role(f".weight.quant_state.bitsandbytes__{options['code']}", ("uint8",), None),
        Role(".weight.quant_map", ("float32",), None, (16,)),
        Role(".weight.nested_quant_map", ("float32",), None, (256,), needed=nested),
        Role(
            ".weight.nested_absmax",
            ("float32",),
            None,
            (-(-values // (BLOCK * _NESTED_BLOCK)),),
            needed=nested,
        ),
    )


def _values(options: Options, parts: Mapping[str, Part]) -> torch.Tensor:
    weight, absmax = parts[".weight"], parts[".weight.absmax"]
    stored = parts[f".weight.quant_state.bitsandbytes__{options['code']}"]
    told = quant_state(options, stored.tensor, stored.size)
    device = weight.tensor.device
    rows, columns = (
        torch.arange(start, start + extent, device=device) for start, extent in zip(weight.start, weight.extent)
    )
    places = rows[:, None] * weight.size[1] + columns
    if weight.dims[1].unit == ONE:
        held = places
        packed = weight.tensor.reshape(-1).view(torch.uint8)
    else:
        per_entry = weight.dims[1].unit
        held = (columns - weight.start[1] // per_entry * per_entry).expand(len(rows), -1)
        packed = weight.tensor.contiguous().view(torch.uint8)
        held = held + torch.arange(len(rows), device=device)[:, None] * (2 * packed.shape[1])
    codes = (packed.reshape(-1)[held // 2] >> 4 * (1 - held % 2)) & 15
    scales = absmax.tensor.reshape(-1)[places // BLOCK] if absmax.dims[1].unit == ONE else absmax.each()
    if options["nested"]:
        codes_of, outer = (parts[f".weight.nested_{name}"].tensor for name in ("quant_map", "absmax"))
        scales = unnested(scales, places // BLOCK, codes_of, outer, told["nested_offset"])
    table = torch.tensor(CODES_OF_BNB[options["code"]], device=device)
    return table[codes.long()] * scales


def quant_state(options: Options, stored: torch.Tensor, size: tuple[int, int]) -> dict[str, Any]:
    """Return the JSON that the state of a matrix of the shape `size`, [out, in], is stored as. Raises ValueError,
    TypeError or KeyError if it does not say what is so."""
    if stored.numel() > _BLOB_LIMIT:
        raise ValueError(f"quant_state has {stored.numel()} bytes")
    told = json.loads(bytes(stored.flatten().tolist()))
    expected = {"quant_type": options["code"], "blocksize": BLOCK, "shape": list(size)}
    if options["nested"]:
        expected["nested_blocksize"] = _NESTED_BLOCK
        offset = told["nested_offset"]
        if not isinstance(offset, float) or not math.isfinite(offset):
            raise ValueError("quant_state has no usable nested_offset")
    for key, value in expected.items():
        if told[key] != value:
            raise ValueError(f"quant_state says {key} {str(told[key])[:50]}, and it is {value}")
    return told


def unnested(
    scales: torch.Tensor, places: torch.Tensor, codes: torch.Tensor, outer: torch.Tensor, offset: float
) -> torch.Tensor:
    """Return scales that are quantized themselves as float32. `places` are their numbers in the whole matrix, in
    blocks; `codes` and `outer` are its nested_quant_map and nested_absmax."""
    return codes.reshape(-1)[scales.long()] * outer.reshape(-1)[places // _NESTED_BLOCK] + offset


def _eight_bits(config: Mapping[str, Any], metadata: Metadata) -> Sequence[Options]:
    return [{}] if config.get("load_in_8bit", config.get("_load_in_8bit")) else []


def _int8_roles(options: Options, size: tuple[int, int] | None) -> Sequence[Role]:
    return (
        Role(".SCB", ("float32",), (Follows(0), Follows(1, ONE))),
        Role(".weight", ("int8",), (Follows(0), Follows(1))),
        Role(".weight_format", ("uint8",), (Follows(0, ONE), Follows(1, ONE)), needed=False),
    )


def _int8_values(options: Options, parts: Mapping[str, Part]) -> torch.Tensor:
    layout = parts.get(".weight_format")
    if layout is not None and int(layout.tensor.flatten()[0]) != 0:
        raise ValueError("weight_format is not that of plain rows")
    return parts[".weight"].each() * parts[".SCB"].each() * _PER_ROW


FORMATS = (
    Format("bitsandbytes_4bit", ".weight", _four_bits, _roles, _values),
    Format("bitsandbytes_8bit", ".weight", _eight_bits, _int8_roles, _int8_values),
)

"""torchao's int8, intx and float8 tensors: the metadata of the files describe each, with the size of its blocks.

Source: `torchao.prototype.safetensors`, and `dequantize` of `Int8Tensor`, `IntxUnpackedToInt8Tensor`, `Float8Tensor`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..bundle import ONE, Follows, Role
from ..dequantise import Format, Metadata, Options, Part

METHODS = ("torchao",)
_KINDS = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
_FLOATS = ("float32", "bfloat16", "float16")


def _options(config: Mapping[str, Any], metadata: Metadata) -> Sequence[Options]:
    found: list[Options] = []
    for text in metadata().values():
        try:
            told = json.loads(text)
            kind, block = told["_type"], told["_data"]["block_size"]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if kind in _KINDS and isinstance(block, list) and {"block": block, "kind": kind} not in found:
            found.append({"block": block, "kind": kind})
    return found


def _roles(options: Options, size: tuple[int, int] | None) -> Sequence[Role]:
    rows, columns = options["block"]
    scaled = (Follows(0, rows), Follows(1, ONE if size and columns >= size[1] else columns))
    is_float = options["kind"] == "Float8Tensor"
    return (
        Role("._weight_qdata", ("float8_e4m3fn",) if is_float else ("int8",), (Follows(0), Follows(1))),
        Role("._weight_scale", _FLOATS, scaled),
        *(() if is_float else (Role("._weight_zero_point", ("int8",), scaled, needed=False),)),
    )


def _values(options: Options, parts: Mapping[str, Part]) -> torch.Tensor:
    numbers, zero = parts["._weight_qdata"].each().float(), parts.get("._weight_zero_point")
    return (numbers if zero is None else numbers - zero.each().float()) * parts["._weight_scale"].each()


FORMATS = (Format("torchao", ".weight", _options, _roles, _values),)

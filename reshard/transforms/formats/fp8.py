"""fp8 with a scale for each block, as DeepSeek and Qwen publish it, and its kin: mxfp8, and experts in fp4.

`weight_block_size` is [rows, columns], 128 × 128 as a rule; null means one scale for the matrix. The last block may be
smaller. Source: `transformers.integrations.finegrained_fp8`, whose `Fp8Dequantize` takes the block size from shapes
instead, so it is wrong for a smaller last block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..bundle import ONE, Follows, Role
from ..dequantise import Format, Metadata, Options, Part
from ..numbers import e2m1, scale_of

METHODS = ("fp8", "mxfp8")
_SCALES = (".weight_scale_inv", ".scale", ".qscale_weight")  # DeepSeek V4 and Mistral have names of their own
_ACTIVATIONS = (".activation_scale", ".input_scale", ".qscale_act")
_FLOATS = ("float32", "bfloat16", "float16")


def _options(config: Mapping[str, Any], metadata: Metadata) -> Sequence[Options]:
    block = config.get("weight_block_size")
    fp8 = [{"block": block, "scale": scale} for scale in _SCALES]
    return [*fp8, *({"block": [1, 32], "scale": scale, "values": "e2m1"} for scale in _SCALES)]


def _roles(options: Options, size: tuple[int, int] | None) -> Sequence[Role]:
    rows, columns = options["block"] or (ONE, ONE)
    per_byte = 2 if "values" in options else 1
    return (
        Role(".weight", ("int8", "uint8") if per_byte == 2 else ("float8_e4m3fn",), (Follows(0), Follows(1, per_byte))),
        Role(options["scale"], (*_FLOATS, "float8_e8m0fnu", "uint8"), (Follows(0, rows), Follows(1, columns))),
        *(Role(one, _FLOATS, (Follows(0, ONE), Follows(1, ONE)), needed=False) for one in _ACTIVATIONS),
    )


def _values(options: Options, parts: Mapping[str, Part]) -> torch.Tensor:
    weight = parts[".weight"]
    numbers = e2m1(weight.unpacked(4, 1)) if "values" in options else weight.each().float()
    return numbers * scale_of(parts[options["scale"]].each())


FORMATS = (Format("fp8", ".weight", _options, _roles, _values),)

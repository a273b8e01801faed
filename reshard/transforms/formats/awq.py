"""AWQ in the layout of its matrix-matrix kernels ("gemm"): 8 outputs a word, in an order of its own.

Source: the packing of AutoAWQ, `AWQ_ORDER`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..bundle import ONE, Follows, Role
from ..dequantise import Format, Metadata, Options, Part

METHODS = ("awq",)
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where a word has its first element, its second …


def _options(config: Mapping[str, Any], metadata: Metadata) -> Sequence[Options]:
    version = config.get("format") or config.get("version") or "gemm"
    if config.get("bits", config.get("w_bit")) != 4 or str(version).lower() != "gemm":
        return []
    return [{"group": config.get("group_size", config.get("q_group_size", 128))}]


def _roles(options: Options, size: tuple[int, int] | None) -> Sequence[Role]:
    group = options["group"] if options["group"] > 0 else ONE
    return (
        Role(".qweight", ("int32",), (Follows(1), Follows(0, 8))),
        Role(".qzeros", ("int32",), (Follows(1, group), Follows(0, 8))),
        Role(".scales", ("float16", "bfloat16"), (Follows(1, group), Follows(0))),
    )


def _values(options: Options, parts: Mapping[str, Part]) -> torch.Tensor:
    scales = parts[".scales"].each()
    numbers, zeros = (parts[role].unpacked(4, 0, _PLACES) for role in (".qweight", ".qzeros"))
    return (numbers - zeros).to(scales.dtype) * scales


FORMATS = (Format("awq", ".weight", _options, _roles, _values),)

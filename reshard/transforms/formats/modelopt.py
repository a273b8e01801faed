"""NVIDIA's modelopt: fp8 with one scale, and nvfp4 with a scale for 16 values and one for the matrix.

transformers cannot load these: folders of them are for other engines. Source: the layout that vLLM reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..bundle import ONE, Follows, Role
from ..dequantise import Format, Metadata, Options, Part
from ..numbers import e2m1

METHODS = ("modelopt", "modelopt_fp4")
_PER_MATRIX = (Follows(0, ONE), Follows(1, ONE))


def _options(config: Mapping[str, Any], metadata: Metadata) -> Sequence[Options]:
    return [{"kind": "fp8"}, {"kind": "nvfp4"}]


def _roles(options: Options, size: tuple[int, int] | None) -> Sequence[Role]:
    inputs = Role(".input_scale", ("float32",), _PER_MATRIX, needed=False)
    if options["kind"] == "fp8":
        return (
            Role(".weight", ("float8_e4m3fn",), (Follows(0), Follows(1))),
            Role(".weight_scale", ("float32",), _PER_MATRIX),
            inputs,
        )
    return (
        Role(".weight", ("uint8",), (Follows(0), Follows(1, 2))),
        Role(".weight_scale", ("float8_e4m3fn",), (Follows(0), Follows(1, 16))),
        Role(".weight_scale_2", ("float32",), _PER_MATRIX),
        inputs,
    )


def _values(options: Options, parts: Mapping[str, Part]) -> torch.Tensor:
    scale = parts[".weight_scale"].each().float()
    if options["kind"] == "fp8":
        return parts[".weight"].each().float() * scale
    return e2m1(parts[".weight"].unpacked(4, 1)) * scale * parts[".weight_scale_2"].each()


FORMATS = (Format("modelopt", ".weight", _options, _roles, _values, runs=False),)

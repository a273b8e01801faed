"""FBGEMM fp8: a scale for each row. Source: `transformers.integrations.fbgemm_fp8`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..bundle import ONE, Follows, Role
from ..dequantise import Format, Options, Part

METHODS = ("fbgemm_fp8",)


def _roles(options: Options, size: tuple[int, int] | None) -> Sequence[Role]:
    return (
        Role(".weight", ("float8_e4m3fn",), (Follows(0), Follows(1))),
        Role(".weight_scale", ("float32", "bfloat16"), (Follows(0), Follows(1, ONE))),
        Role(".input_scale_ub", ("float32",), (Follows(0, ONE), Follows(1, ONE)), needed=False),
    )


def _values(options: Options, parts: Mapping[str, Part]) -> torch.Tensor:
    return parts[".weight"].each().float() * parts[".weight_scale"].each().float()


FORMATS = (Format("fbgemm_fp8", ".weight", lambda config, metadata: [{}], _roles, _values),)

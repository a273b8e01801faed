"""mxfp4 of gpt-oss: the experts of a layer in one tensor, two values a byte, a power of two for each 32 of them.

The checkpoint has the matrices transposed, [out, in], against the parameters, [in, out]. Source:
`transformers.integrations.mxfp4`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..bundle import Follows, Role
from ..dequantise import Format, Options, Part
from ..numbers import e2m1, scale_of

METHODS = ("mxfp4",)
_BLOCK = 32  # values


def _roles(options: Options, size: tuple[int, int] | None) -> Sequence[Role]:
    stored = size and (size[1], size[0] // _BLOCK, _BLOCK // 2)
    return (
        Role("_blocks", ("uint8",), (Follows(1), Follows(0, 2)), stored),
        Role("_scales", ("uint8",), (Follows(1), Follows(0, _BLOCK))),
    )


def _values(options: Options, parts: Mapping[str, Part]) -> torch.Tensor:
    return e2m1(parts["_blocks"].unpacked(4, 0)) * scale_of(parts["_scales"].each())


FORMATS = (Format("mxfp4", "", lambda config, metadata: [{}], _roles, _values),)

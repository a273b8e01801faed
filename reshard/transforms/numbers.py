"""Numbers of a few bits: the values that their codes stand for."""

from __future__ import annotations

import torch

__all__ = ["CODES_OF_BNB", "e2m1", "scale_of"]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
# The codes of bitsandbytes: 16 values from -1 to 1 (`bitsandbytes.functional.get_4bit_type`).
CODES_OF_BNB = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (*(value / 12 for value in _FP4), 0.0, *(-value / 12 for value in _FP4[1:])),
}


def e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Return the values of fp4 (1 sign, 2 exponent bits and 1 of the fraction) for codes from 0 to 15, in float32."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=codes.device)
    return table[codes.long()]


def scale_of(stored: torch.Tensor) -> torch.Tensor:
    """Return scales as float32. A byte is an exponent, with a bias of 127 (E8M0)."""
    return torch.exp2(stored.float() - 127) if stored.dtype == torch.uint8 else stored.float()

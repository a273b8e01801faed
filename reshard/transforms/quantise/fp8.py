"""The bytes of transformers' fp8 by blocks. Source: `transformers.integrations.finegrained_fp8.Fp8Quantize`."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .recipe import Made, Read, Recipe, tiles

_FP8 = torch.float8_e4m3fn
_MOST = torch.finfo(_FP8).max


def blocks(config: Any) -> Recipe:
    """Return the recipe for transformers' `FineGrainedFP8Config`. Raises ValueError for what needs more than weights.

    A matrix whose sides are not whole blocks is not quantized, as there; without a block size, it is one block.
    """
    if config.activation_scheme != "dynamic":
        raise ValueError("activation_scheme static needs scales of activations, which only running the model gives")
    # transformers 5.17 does not have all of these options yet.
    experts, more = getattr(config, "expert_dtype", "fp8"), getattr(config, "modules_to_convert", None)
    if experts != "fp8" or config.dequantize or more:
        raise ValueError(
            "expert_dtype, dequantize and modules_to_convert are of checkpoints that are quantized already"
        )
    size = config.weight_block_size
    exponents = getattr(config, "scale_fmt", "float") == "ue8m0"

    def made(shape: tuple[int, int], dtype: str, largest: float | None) -> tuple[Made, ...]:
        block = tuple(size) if size else shape
        grid = (shape[0] // block[0], shape[1] // block[1])
        how = (block, largest, exponents)
        kind = "float8_e8m0fnu" if exponents else "float32"
        return (
            Made(".weight", "float8_e4m3fn", shape, shape, shape, functools.partial(_values, *how)),
            Made(".weight_scale_inv", kind, grid, grid, shape, functools.partial(_scales, *how)),
        )

    def fits(shape: tuple[int, int]) -> bool:
        return not size or (shape[0] % size[0] == 0 and shape[1] % size[1] == 0)

    return Recipe(made, None if size else _largest, fits)


def _largest(read: Read, values: int) -> float:
    found = [read(*tile).float().abs().amax() for tile in tiles((0, 1), (0, values), (1, 1))]
    return torch.stack(found).amax().item()  # NaN if any is


def _scales(
    block: tuple[int, int],
    largest: float | None,
    exponents: bool,
    read: Read,
    top: int,
    bottom: int,
    left: int,
    right: int,
) -> torch.Tensor:
    """Return the scales of blocks as they are stored, [rows, columns] of blocks."""
    if largest is not None:
        return _scale(torch.full((bottom - top, right - left), largest), exponents)[0]
    high, wide = block
    most = torch.empty(bottom - top, right - left)
    for first, last, start, stop in tiles((top * high, bottom * high), (left * wide, right * wide), block):
        where = slice(first // high - top, last // high - top), slice(start // wide - left, stop // wide - left)
        most[where] = _most(_in_blocks(read(first, last, start, stop), block))
    return _scale(most, exponents)[0]


def _in_blocks(values: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Return the values of whole blocks in fp32, [rows of blocks, rows, columns of blocks, columns]."""
    return values.float().unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))


def _most(values: torch.Tensor) -> torch.Tensor:
    return values.abs().amax(3).amax(1)


def _scale(most: torch.Tensor, exponents: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales of blocks with these largest values: as they are stored, and what values are multiplied by."""
    scales = torch.where(most > 0, _MOST / torch.where(most > 0, most, 1.0), 1.0)
    stored = 1.0 / scales
    if exponents:
        stored = torch.pow(2.0, torch.ceil(torch.log2(stored.clamp(min=torch.finfo(torch.float32).tiny))))
        stored = stored.to(torch.float8_e8m0fnu)
        scales = 1.0 / stored.float()
    return stored, scales


def _values(
    block: tuple[int, int],
    largest: float | None,
    exponents: bool,
    read: Read,
    top: int,
    bottom: int,
    left: int,
    right: int,
) -> torch.Tensor:
    found = torch.empty(bottom - top, right - left, dtype=_FP8)
    if largest is not None:
        _, scales = _scale(torch.tensor(largest), exponents)
        for first, last, start, stop in tiles((top, bottom), (left, right), (1, 1)):
            values = (read(first, last, start, stop).float() * scales).clamp_(-_MOST, _MOST).to(_FP8)
            found[first - top : last - top, start - left : stop - left] = values
        return found
    high, wide = block
    # Whole blocks: a part of one needs the largest value of all of it.
    over = (top // high * high, -(-bottom // high) * high), (left // wide * wide, -(-right // wide) * wide)
    for first, last, start, stop in tiles(*over, block):
        values = _in_blocks(read(first, last, start, stop), block)
        _, scales = _scale(_most(values), exponents)
        values = (values * scales[:, None, :, None]).clamp_(-_MOST, _MOST).view(last - first, stop - start).to(_FP8)
        low, after, begin, end = max(first, top), min(last, bottom), max(start, left), min(stop, right)
        part = values[low - first : after - first, begin - start : end - start]
        found[low - top : after - top, begin - left : end - left] = part
    return found

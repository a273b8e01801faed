"""The bytes of bitsandbytes on a CPU: nf4 and fp4, with scales that may be quantized themselves, and int8.

Source: `bitsandbytes.backends.default.ops` (`quantize_4bit`, `int8_vectorwise_quant`), which a CPU uses, and of the
native library (`csrc/cpu_ops.cpp`) `quantize_blockwise`, for the scales. Those are release 0.50.2's: earlier ones round
at other midpoints.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from typing import Any

import torch

from ..numbers import CODES_OF_BNB
from .recipe import Made, Read, Recipe, constant, tiles

_BLOCK, _NESTED_BLOCK = 64, 256
_STEPS = 1024  # of the table from -1 to 0, and from 0 to 1: so many that no two bounds of a code are in one
_LEAST = 1e-38  # scale of a block of zeros
_POINTS = 65535  # of the table by which the native library rounds scales


def four_bits(config: Any) -> Recipe:
    """Return the recipe of nf4 or fp4 for transformers' `BitsAndBytesConfig`."""
    code, nested = config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant
    storage = str(config.bnb_4bit_quant_storage).removeprefix("torch.")
    size = config.bnb_4bit_quant_storage.itemsize

    def made(shape: tuple[int, int], dtype: str, offset: float | None) -> tuple[Made, ...]:
        values = math.prod(shape)
        blocks = -(-values // _BLOCK)
        # If a row is whole blocks, a part of the columns can be made without the others.
        matrix = shape if shape[1] % _BLOCK == 0 else (1, values)
        state = {"quant_type": code, "blocksize": _BLOCK, "dtype": dtype, "shape": shape}
        if nested:
            state |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        blob = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        packed, scales = (-(-values // (2 * size)), 1), (matrix[0], -(-matrix[1] // _BLOCK))
        found = [
            Made(
                ".weight",
                storage,
                packed,
                (matrix[0], -(-matrix[1] // (2 * size))),
                matrix,
                functools.partial(_packed, code, matrix[1], config.bnb_4bit_quant_storage),
            ),
            constant(f".weight.quant_state.bitsandbytes__{code}", blob, matrix),
            constant(".weight.quant_map", torch.tensor(CODES_OF_BNB[code]), matrix),
        ]
        if not nested:
            return (
                *found,
                Made(".weight.absmax", "float32", (blocks,), scales, matrix, functools.partial(_absmax, matrix[1])),
            )
        whole, groups = (1, values), -(-blocks // _NESTED_BLOCK)
        inner = functools.partial(_nested, values, offset or 0.0)
        return (
            *found,
            Made(".weight.absmax", "uint8", (blocks,), (1, blocks), whole, lambda *box: inner(*box)[0]),
            Made(
                ".weight.nested_absmax",
                "float32",
                (groups,),
                (1, groups),
                whole,
                functools.partial(_outer, values, offset or 0.0),
            ),
            constant(".weight.nested_quant_map", _dynamic_map(), matrix),
        )

    return Recipe(made, _offset if nested else None, lambda shape: math.prod(shape) % (2 * size) == 0 or size == 1)


def _blocks_of(
    read: Read, width: int, rows: tuple[int, int], blocks: tuple[int, int]
) -> Iterator[tuple[tuple[slice, slice], torch.Tensor]]:
    """Yield the blocks of a box by tiles: where they are in it, and their values [rows, blocks, 64] in fp32. A block at
    the end that is smaller has them [rows, 1, its size]."""
    last = width // _BLOCK
    for top, bottom, left, right in tiles(rows, (blocks[0] * _BLOCK, min(blocks[1], last) * _BLOCK), (1, _BLOCK)):
        where = slice(top - rows[0], bottom - rows[0]), slice(left // _BLOCK - blocks[0], right // _BLOCK - blocks[0])
        yield where, read(top, bottom, left, right).float().unflatten(1, (-1, _BLOCK))
    if blocks[1] > last:
        where = slice(0, rows[1] - rows[0]), slice(last - blocks[0], last + 1 - blocks[0])
        yield where, read(*rows, last * _BLOCK, width).float().unsqueeze(1)


def _absmax(width: int, read: Read, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
    """Return the scales of blocks: the largest absolute value of each. That of a last, smaller block is not 0."""
    found = torch.empty(bottom - top, right - left)
    for where, values in _blocks_of(read, width, (top, bottom), (left, right)):
        largest = values.abs().amax(2)
        found[where] = largest if values.shape[2] == _BLOCK else largest.clamp(min=_LEAST)
    return found


def _packed(
    code: str, width: int, storage: torch.dtype, read: Read, top: int, bottom: int, left: int, right: int
) -> torch.Tensor:
    """Return elements of `storage`, each of which holds two values a byte, the first in the high half."""
    per = 2 * storage.itemsize
    first, last = left * per // _BLOCK, -(-right * per // _BLOCK)
    codes = torch.zeros(bottom - top, (last - first) * _BLOCK, dtype=torch.uint8)
    for where, values in _blocks_of(read, width, (top, bottom), (first, last)):
        start = where[1].start * _BLOCK
        found = _codes(code, values).flatten(1)
        codes[where[0], start : start + found.shape[1]] = found
        if found.shape[1] % 2:  # a last value that has no other to share its byte with has a zero
            codes[where[0], start + found.shape[1]] = _codes(code, torch.zeros(1, 1, 1)).item()
    pairs = codes.view(torch.int16)  # the first value is the low byte
    packed = (pairs << 4 | pairs >> 8).to(torch.uint8)
    begin = left * storage.itemsize - first * _BLOCK // 2
    return packed[:, begin : begin + (right - left) * storage.itemsize].contiguous().view(storage)


def _codes(code: str, values: torch.Tensor) -> torch.Tensor:
    """Return the codes (uint8) of blocks of fp32 values [rows, blocks, values].

    A value is scaled by the largest of its block, and has the number of bounds that are smaller than it. Instead of a
    search, it looks up a bucket of a table, which has one bound at most, and is compared with that.
    """
    scale = values.abs().amax(2, keepdim=True).clamp_(min=_LEAST)
    scaled = values * (1.0 / scale) if values.shape[2] == _BLOCK else values / scale
    scaled.clamp_(-1, 1)
    bounds, order, pairs, bound = _table(code)
    if not bool(scale.isfinite().all()):  # NaN has no bucket
        return order[torch.bucketize(scaled, bounds)]
    bucket = _bucket(scaled).flatten()
    is_above = (scaled.flatten() > bound.index_select(0, bucket)).view(torch.uint8)
    pair = pairs.index_select(0, bucket)
    return ((pair & 15) ^ (pair >> 4) * is_above).view(scaled.shape)


def _bucket(scaled: torch.Tensor) -> torch.Tensor:
    return torch.add(_CENTRE, scaled, alpha=_STEPS).to(torch.int32)


_CENTRE = torch.tensor(float(_STEPS))


@functools.cache
def _table(code: str) -> tuple[torch.Tensor, ...]:
    """Return the bounds of a code, the code that each number of bounds below stands for, and for each bucket the code
    below its bound (with what changes above it in the high half of a byte), and the bound: 2 if it has none."""
    values = torch.tensor(CODES_OF_BNB[code])
    order = torch.argsort(values)
    bounds = (values[order[:-1]] + values[order[1:]]) / 2
    order = order.to(torch.uint8)
    buckets = torch.arange(2 * _STEPS + 1)
    of_bounds = _bucket(bounds)
    assert len(of_bounds.unique()) == len(bounds)
    before = torch.bucketize(buckets, of_bounds)
    bound = torch.full(buckets.shape, 2.0)
    bound[of_bounds.long()] = bounds
    after = before + (bound < 2).long()
    return bounds, order, order[before] | (order[before] ^ order[after]) << 4, bound


def _offset(read: Read, values: int) -> float:
    """Return the mean of the scales of a matrix, as one thread of torch adds them. Raises ValueError if it has none."""
    mean = _absmax(values, read, 0, 1, 0, -(-values // _BLOCK)).flatten().mean().item()
    if not math.isfinite(mean):
        raise ValueError("has values that are not finite, so its scales cannot be quantized")
    return mean


def _nested(
    values: int, offset: float, read: Read, top: int, bottom: int, left: int, right: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales `left` to `right` as numbers of 8 bits, and the scales of all their blocks."""
    first = left // _NESTED_BLOCK * _NESTED_BLOCK
    last = min(-(-right // _NESTED_BLOCK) * _NESTED_BLOCK, -(-values // _BLOCK))
    scales = (_absmax(values, read, 0, 1, first, last) - torch.tensor(offset)).flatten()
    blocks = torch.nn.functional.pad(scales, (0, -len(scales) % _NESTED_BLOCK)).view(-1, _NESTED_BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    scaled = (blocks * (1.0 / largest)).clamp_(-1, 1)
    # The library multiplies and adds at once, so it rounds once.
    place = (((scaled + 1) * 0.5).double() * _POINTS + 0.5).float().nan_to_num(0).to(torch.int32)
    found = _nearest().index_select(0, place.flatten()).view(blocks.shape).masked_fill(largest == 0, 0)
    return found.view(1, -1)[:, left - first : right - first], largest.view(1, -1)


def _outer(values: int, offset: float, read: Read, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
    stop = min(right * _NESTED_BLOCK, -(-values // _BLOCK))
    return _nested(values, offset, read, top, bottom, left * _NESTED_BLOCK, stop)[1]


@functools.cache
def _nearest() -> torch.Tensor:
    """Return the nearest code for each of 65,536 values from -1 to 1."""
    codes = _dynamic_map()
    points = torch.arange(_POINTS + 1, dtype=torch.int32).float() * 2 / _POINTS - 1
    return torch.bucketize(points, 0.5 * (codes[:-1] + codes[1:])).to(torch.uint8)


@functools.cache
def _dynamic_map() -> torch.Tensor:
    """Return bitsandbytes' numbers of 8 bits, in order: the more digits, the fewer zeros are after the point."""
    data: list[float] = []
    for exponent in range(7):
        steps = torch.linspace(0.1, 1, 2**exponent + 1)
        means = 10 ** (exponent - 6) * ((steps[:-1] + steps[1:]) / 2.0)
        data += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted([*data, 0.0, 1.0]))


def eight_bits(config: Any) -> Recipe:
    """Return the recipe of int8 for transformers' `BitsAndBytesConfig`. Raises ValueError if it keeps 16 bits."""
    if config.llm_int8_has_fp16_weight:
        raise ValueError("llm_int8_has_fp16_weight keeps the weights as they are")

    def made(shape: tuple[int, int], dtype: str, _: float | None) -> tuple[Made, ...]:
        return (
            Made(".weight", "int8", shape, shape, shape, functools.partial(_int8, shape[1])),
            Made(".SCB", "float32", (shape[0],), (shape[0], 1), shape, functools.partial(_rows, shape[1])),
            constant(".weight_format", torch.tensor(0, dtype=torch.uint8), shape),
        )

    return Recipe(made)


def _rows(width: int, read: Read, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
    """Return the largest absolute value of each row, once cast to fp16: [rows, 1] in fp32."""
    found = torch.zeros(bottom - top, 1)
    for first, last, start, stop in tiles((top, bottom), (0, width), (1, 1)):
        part = read(first, last, start, stop).half().abs().amax(1, keepdim=True).float()
        held = found[first - top : last - top]
        held.copy_(torch.maximum(held, part) if start else part)
    return found[:, left:right]


def _int8(width: int, read: Read, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
    found = torch.empty(bottom - top, right - left, dtype=torch.int8)
    factor = 127.0 / _rows(width, read, top, bottom, 0, 1)
    for first, last, start, stop in tiles((top, bottom), (left, right), (1, 1)):
        values = read(first, last, start, stop).half() * factor[first - top : last - top]
        found[first - top : last - top, start - left : stop - left] = values.round_().to(torch.int8)
    return found

"""Quantizing: the bytes of bitsandbytes and of transformers' Fp8Quantize, however a matrix is cut into boxes."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, FineGrainedFP8Config

from reshard.transforms.quantise import RECIPES
from reshard.transforms.quantise.bitsandbytes import _dynamic_map
from reshard.transforms.quantise.recipe import Recipe

Tensors = dict[str, torch.Tensor]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows of whole blocks of 64, blocks that go from one row into the next, a last block that is smaller, one row, one
# value, an odd number of values, more blocks than the scales of one nested block.
SHAPES = [(64, 64), (48, 128), (7, 65), (1, 64), (1, 1), (5, 7), (33, 192), (300, 1000), (1, 333), (256, 448)]


def filled(shape: tuple[int, int], how: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator) * 0.05
    if how == "zeros":
        weight[:, :70] = 0
    elif how == "large":
        weight *= 1e4
    elif how == "equal":
        weight.fill_(0.3)
    elif how == "infinite":
        weight[0, 0] = -torch.inf
    elif how == "nan":
        weight[-1, -1] = torch.nan
    return weight


def made(recipe: Recipe, weight: torch.Tensor, parts: int) -> Tensors:
    """Quantize a matrix, every tensor in `parts` × `parts` boxes."""
    flat = weight.reshape(1, -1)
    number = (
        recipe.measure(lambda top, end, left, right: flat[top:end, left:right], weight.numel())
        if recipe.measure
        else None
    )
    found = {}
    for one in recipe.made((weight.shape[0], weight.shape[1]), str(weight.dtype).removeprefix("torch."), number):
        seen = weight.reshape(one.matrix)
        grid = torch.empty(one.grid, dtype=getattr(torch, one.dtype))
        rows, columns = (sorted({size * part // parts for part in range(parts + 1)}) for size in one.grid)
        for (top, end), (left, right) in itertools.product(itertools.pairwise(rows), itertools.pairwise(columns)):
            grid[top:end, left:right] = one.box(lambda a, b, c, d, m=seen: m[a:b, c:d], top, end, left, right)
        found[one.suffix] = grid.reshape(one.shape)
    return found


def by_bitsandbytes(weight: torch.Tensor, config: Any) -> Tensors:
    from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

    if config.load_in_8bit:
        data, scales, _ = int8_vectorwise_quant(weight.half())
        return {".weight": data, ".SCB": scales, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    data, state = quantize_4bit(
        weight.clone(),
        blocksize=64,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
    )
    return {".weight": data, **{f".weight.{name}": one for name, one in state.as_dict(packed=True).items()}}


def by_transformers(weight: torch.Tensor, config: Any) -> Tensors:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    class Quantizer:
        quantization_config = config

    found = Fp8Quantize(Quantizer()).convert({"x.weight": weight})
    return {name.removeprefix("x"): one for name, one in found.items()}


def assert_same_bytes(found: Tensors, expected: Tensors) -> None:
    """Every NaN of a scale is the same one: which one it is depends on the kernel that compared it."""
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert (found[name].dtype, found[name].shape) == (one.dtype, one.shape), name
        both = [t.nan_to_num(7.0) if t.dtype == torch.float32 else t for t in (found[name], one)]
        left, right = (t.contiguous().flatten().view(torch.uint8) for t in both)
        assert torch.equal(left, right), name


CASES: dict[str, tuple[str, Any, Callable[[torch.Tensor, Any], Tensors]]] = {
    "nf4": ("nf4", {}, by_bitsandbytes),
    "nf4 nested": ("nf4", {"bnb_4bit_use_double_quant": True}, by_bitsandbytes),
    "nf4 stored in bf16": ("nf4", {"bnb_4bit_quant_storage": torch.bfloat16}, by_bitsandbytes),
    "fp4": ("fp4", {}, by_bitsandbytes),
    "fp4 nested": ("fp4", {"bnb_4bit_use_double_quant": True}, by_bitsandbytes),
    "int8": ("int8", {}, by_bitsandbytes),
    "fp8": ("fp8", {"weight_block_size": (128, 64)}, by_transformers),
    "fp8 in small blocks": ("fp8", {"weight_block_size": (1, 7)}, by_transformers),
    "fp8 by powers of two": ("fp8", {"weight_block_size": (16, 16), "scale_fmt": "ue8m0"}, by_transformers),
    "fp8 in one block": ("fp8", {"weight_block_size": None}, by_transformers),
}


def config_of(kind: str, options: dict[str, Any]) -> Any:
    if kind == "fp8":
        return FineGrainedFP8Config(**options)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **options)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, **options)


@pytest.mark.parametrize("how", ["plain", "zeros", "large", "equal", "infinite", "nan"])
@pytest.mark.parametrize("case", CASES)
def test_the_bytes_are_those_of_the_library(case: str, how: str) -> None:
    kind, options, oracle = CASES[case]
    config = config_of(kind, options)
    recipe = RECIPES[kind](config)
    compared = 0
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        weight = filled(shape, how).to(dtype)
        if not recipe.fits(shape) or (config_is_nested(config) and not weight.isfinite().all()):
            continue
        expected = oracle(weight, config)
        for parts in (1, 3):
            assert_same_bytes(made(recipe, weight, parts), expected)
            compared += 1
    assert compared or (how in ("infinite", "nan") and config_is_nested(config))


def config_is_nested(config: Any) -> bool:
    return bool(getattr(config, "bnb_4bit_use_double_quant", False))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_values_at_the_bounds_of_a_code_round_as_in_the_library(kind: str) -> None:
    """Every midpoint of two codes, and the numbers just below and above."""
    from bitsandbytes.functional import get_4bit_type

    codes = get_4bit_type(kind, device="cpu").sort().values
    bounds = (codes[:-1] + codes[1:]) / 2
    near = torch.cat([bounds, torch.nextafter(bounds, bounds - 1), torch.nextafter(bounds, bounds + 1)])
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 1 : 1 + len(near)] = 1.0, near
    config = config_of(kind, {})
    assert_same_bytes(made(RECIPES[kind](config), weight, 1), by_bitsandbytes(weight, config))


def test_the_map_of_nested_scales_is_the_librarys() -> None:
    from bitsandbytes.functional import create_dynamic_map

    assert torch.equal(_dynamic_map(), create_dynamic_map())


def test_scales_that_are_not_finite_are_not_nested() -> None:
    config = config_of("nf4", {"bnb_4bit_use_double_quant": True})
    with pytest.raises(ValueError, match="not finite"):
        made(RECIPES["nf4"](config), filled((64, 64), "nan"), 1)


@pytest.mark.parametrize("size", [3, 5_000_000])
def test_the_mean_of_scales_is_that_of_one_thread(size: int) -> None:
    """torch adds the scales of a large matrix by threads, so bitsandbytes' own offset depends on their number."""
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(1, 64 * size if size < 10 else size, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        measure = RECIPES["nf4"](config_of("nf4", {"bnb_4bit_use_double_quant": True})).measure
        assert measure is not None
        assert measure(lambda top, end, left, right: weight[top:end, left:right], weight.numel()) == state.offset.item()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("int8", {"llm_int8_has_fp16_weight": True}),
        ("fp8", {"activation_scheme": "static"}),
        ("fp8", {"expert_dtype": "fp4"}),
        ("fp8", {"dequantize": True}),
    ],
)
def test_what_needs_more_than_weights_is_refused(kind: str, options: dict[str, Any]) -> None:
    if kind == "fp8" and not options.keys() <= inspect.signature(FineGrainedFP8Config).parameters.keys():
        pytest.skip("this transformers has no such option")
    with pytest.raises(ValueError, match=next(iter(options))):
        RECIPES[kind](config_of(kind, options))

"""Every format: the parts of all ranks, dequantised and put together, are bit for bit what the format's own library
makes of the whole. Where it has none, or is wrong, the values that were packed tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizing import KINDS, Tensors, bundle_of, compressed_scheme, mxfp4

from reshard.errors import IntegrityError
from reshard.sharding.dealing import deal
from reshard.sharding.placement import Nested, PackedShard, Placement, Ranges, Replicate, Shard, pieces
from reshard.strategies.shards import take
from reshard.transforms.bundle import member_placement
from reshard.transforms.dequantise import dequantised

FLOAT = torch.float32


def spread(scale: torch.Tensor, shape: torch.Size, rows: int, columns: int) -> torch.Tensor:
    """Repeat a grid of scales over blocks of a size; the last ones may be smaller."""
    return scale.float().repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]


def of_blocks(rows: int, columns: int, suffix: str = ".weight_scale_inv") -> Callable[[Tensors, torch.Tensor], Any]:
    def library(tensors: Tensors, weight: torch.Tensor) -> torch.Tensor:
        scale = tensors[suffix]
        if scale.dtype == torch.uint8:
            scale = torch.exp2(scale.float() - 127)
        wanted = tensors[".weight"].float() * spread(scale, weight.shape, rows, columns)
        if weight.shape[0] % rows == weight.shape[1] % columns == 0:  # there transformers is right
            from transformers.integrations.finegrained_fp8 import Fp8Dequantize

            theirs = Fp8Dequantize(None)._dequantize_one(tensors[".weight"], tensors[suffix], FLOAT)
            assert torch.equal(theirs, wanted)
        return wanted

    return library


def bitsandbytes(tensors: Tensors, weight: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    told = {name.removeprefix(".weight."): value for name, value in tensors.items() if name != ".weight"}
    state = QuantState.from_dict(told, torch.device("cpu"))
    # Asked for one row: its kernel for AVX-512 takes wrong scales where several rows share a block.
    state.shape = torch.Size((1, weight.numel()))
    return dequantize_4bit(tensors[".weight"], state).reshape(weight.shape)


def int8(tensors: Tensors, weight: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    return int8_vectorwise_dequant(tensors[".weight"], tensors[".SCB"])


def in_groups(group: int, bits: int = 4, *, by_activity: bool = False) -> Callable[[Tensors, torch.Tensor], Any]:
    """The codes as the quantizer chose them, before they were packed."""

    def values(tensors: Tensors, weight: torch.Tensor) -> torch.Tensor:
        from quantizing import _codes

        order = torch.arange(weight.shape[1])
        if by_activity:
            order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(weight.shape[1]))
        width = weight.shape[1] if group < 0 else group
        codes, scales, zeros = _codes(weight[:, order], width, bits, zero_points=True)
        shifted = (codes.unflatten(1, (-1, width)) - zeros[..., None]).half() * scales[..., None]
        return shifted.flatten(1)[:, order.argsort()]

    return values


def compressed(form: str) -> Callable[[Tensors, torch.Tensor], Any]:
    def library(tensors: Tensors, weight: torch.Tensor, told: dict[str, Any]) -> torch.Tensor:
        from compressed_tensors.compressors import BaseCompressor

        scheme = compressed_scheme(**told["config_groups"]["group_0"]["weights"])
        state = {name.removeprefix("."): value for name, value in tensors.items()}
        return BaseCompressor.get_value_from_registry(form).decompress(state, scheme)["weight"]

    return lambda tensors, weight: library(tensors, weight, CONFIGS[form])


def nvfp4(tensors: Tensors, weight: torch.Tensor) -> torch.Tensor:
    codes = torch.stack([tensors[".weight"] & 15, tensors[".weight"] >> 4], -1).flatten(1)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    return table[codes.long()] * spread(tensors[".weight_scale"], weight.shape, 1, 16) * tensors[".weight_scale_2"]


CONFIGS: dict[str, dict[str, Any]] = {}
ORACLES: dict[str, Callable[[Tensors, torch.Tensor], torch.Tensor]] = {
    "fp8": of_blocks(16, 16),
    "fp8_e8m0": of_blocks(16, 16, ".scale"),
    "fp8_tensor": lambda tensors, weight: tensors[".weight"].float() * tensors[".weight_scale_inv"],
    "mxfp8": of_blocks(1, 32),
    "fbgemm": lambda tensors, weight: tensors[".weight"].float() * tensors[".weight_scale"],
    "nf4": bitsandbytes,
    "nf4_nested": bitsandbytes,
    "fp4_bf16": bitsandbytes,
    "int8": int8,
    "awq": in_groups(8),
    "gptq": in_groups(8),
    "gptq_8": in_groups(-1, 8),
    "gptq_order": in_groups(8, by_activity=True),
    "ct_w4": compressed("pack-quantized"),
    "ct_w4_zero": compressed("pack-quantized"),
    "ct_w8": compressed("int-quantized"),
    "ct_fp8": compressed("float-quantized"),
    "ct_fp8_block": compressed("float-quantized"),
    "ct_nvfp4": compressed("nvfp4-pack-quantized"),
    "modelopt_fp8": lambda tensors, weight: tensors[".weight"].float() * tensors[".weight_scale"],
    "modelopt_nvfp4": nvfp4,
}
STEPS = {"ct_nvfp4": (1, 16), "modelopt_nvfp4": (1, 16), "mxfp8": (1, 4)}  # what the quantizer needs of rows, columns
STEPS["ct_w4_zero"] = (16, 8)  # the library fails on zero points in one word
STEPS |= dict.fromkeys(("awq", "gptq", "gptq_8", "gptq_order", "ct_w4"), (8, 8))


def placements(shape: tuple[int, int], ranks: int, draw: Any) -> Placement:
    """Any placement that a style or the heads can give: even, packed, uneven, overlapping, replicated."""
    dim = draw(st.integers(0, 1))
    size = shape[dim]
    kinds: list[Placement] = [Replicate(), Shard(dim), Ranges(dim, tuple((part,) for part in deal(size, ranks)))]
    if size % 2 == 0:
        kinds.append(PackedShard(dim, (size // 2,) * 2))
    if ranks % 2 == 0:
        kinds.append(Nested(Shard(dim), Replicate(), 2))
    bounds = sorted(draw(st.lists(st.integers(0, size), min_size=ranks - 1, max_size=ranks - 1)))
    parts = list(zip([0, *bounds], [*bounds, size]))
    kinds.append(Ranges(dim, tuple((part,) for part in parts)))
    twice = tuple((part, (max(0, part[0] - 3), part[1])) for part in parts)  # a rank may hold elements twice
    kinds.append(Ranges(dim, twice))
    return draw(st.sampled_from(kinds))


def put_together(
    tensors: Tensors, kind: str, shape: tuple[int, ...], placement: Placement, ranks: int, dtype: torch.dtype
) -> torch.Tensor:
    name = "x" if kind == "mxfp4" else "x.weight"
    form, bundle, seen = bundle_of(kind, tensors, shape, name)
    whole = torch.full(shape, torch.nan, dtype=dtype)
    for rank in range(ranks):
        held = {}
        for one, member in bundle.members.items():
            there = member_placement(member, bundle.blocks, placement, shape, ranks)
            held[one] = take(seen[one], there, seen[one].shape, rank=rank, world_size=ranks)
        part = dequantised(form, bundle, placement, held, rank=rank, world_size=ranks, dtype=dtype)
        for piece in pieces(placement, shape, rank=rank, world_size=ranks):
            there = tuple(slice(at, at + size) for at, size in zip(piece.start, piece.extent))
            here = tuple(slice(at, at + size) for at, size in zip(piece.local_start, piece.extent))
            assert whole[there].isnan().all() or torch.equal(
                whole[there].nan_to_num(), torch.where(whole[there].isnan(), 0, part[here])
            )
            whole[there] = part[here]
    return whole


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None, database=None)
@given(data=st.data())
def test_ranks_make_what_the_library_does(kind: str, data: st.DataObject) -> None:
    step = STEPS.get(kind, (1, 2))
    shape = tuple(size * of for size, of in zip((data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))), (8, 8)))
    shape = tuple(-(-size // of) * of for size, of in zip(shape, step))
    ranks, seed = data.draw(st.integers(2, 5)), data.draw(st.integers(0, 99))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    quantize, config = KINDS[kind]
    if "format" in config:
        CONFIGS[config["format"]] = config
    tensors = quantize(weight)
    placement = placements(shape, ranks, data.draw)
    wanted = ORACLES[kind](tensors, weight)
    dtype = data.draw(st.sampled_from([FLOAT, torch.bfloat16])) if kind != "ct_nvfp4" else torch.bfloat16
    assert torch.equal(put_together(tensors, kind, shape, placement, ranks, dtype), wanted.to(dtype))


@settings(max_examples=15, deadline=None, database=None)
@given(
    experts=st.integers(1, 5),
    inputs=st.integers(1, 4),
    outputs=st.integers(1, 9),
    ranks=st.integers(2, 5),
    dim=st.integers(0, 2),
)
def test_experts_of_gpt_oss(experts: int, inputs: int, outputs: int, ranks: int, dim: int) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    shape = (experts, 32 * inputs, outputs)
    tensors = mxfp4(torch.randn(shape, generator=torch.Generator().manual_seed(outputs)))
    wanted = convert_moe_packed_tensors(tensors["_blocks"], tensors["_scales"])
    assert torch.equal(put_together(tensors, "mxfp4", shape, Shard(dim), ranks, torch.bfloat16), wanted)


def test_a_smaller_last_block_is_wrong_upstream() -> None:
    """transformers takes the size of a block from the shapes, or refuses: ours is told it."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    tensors = KINDS["fp8"][0](weight)
    wanted = ORACLES["fp8"](tensors, weight)
    theirs = Fp8Dequantize(None)._dequantize_one(tensors[".weight"], tensors[".weight_scale_inv"], FLOAT)
    assert (theirs - wanted).abs().max() / wanted.abs().max() > 0.01
    assert torch.equal(put_together(tensors, "fp8", (24, 32), Shard(0), 3, FLOAT), wanted)


HOSTILE: dict[str, tuple[str, Callable[[Tensors], None]]] = {
    "a group that is not there": ("gptq_order", lambda t: t[".g_idx"].fill_(99)),
    "a negative group": ("gptq_order", lambda t: t[".g_idx"].fill_(-1)),
    "groups in an order that is not told": ("gptq", lambda t: t.update({".g_idx": t[".g_idx"].flip(0)})),
    "a shape that lies": ("ct_w4", lambda t: t[".weight_shape"].fill_(1 << 40)),
    "a state that is no JSON": ("nf4", lambda t: t[".weight.quant_state.bitsandbytes__nf4"].fill_(91)),
    "a state of another shape": ("nf4", lambda t: _state(t, shape=[1 << 40, 1 << 40])),
    "a state of another block": ("nf4", lambda t: _state(t, blocksize=1)),
    "a state without a code": ("nf4", lambda t: _state(t, quant_type=None)),
    "a state that is a list": ("nf4", lambda t: t.update({STATE: torch.tensor(list(b"[]"), dtype=torch.uint8)})),
    "an endless state": ("nf4", lambda t: t.update({STATE: torch.full((1 << 20,), 91, dtype=torch.uint8)})),
    "an offset that is no number": ("nf4_nested", lambda t: _state(t, nested_offset="x")),
    "int8 in tiles": ("int8", lambda t: t.update({".weight_format": torch.tensor(2, dtype=torch.uint8)})),
}
STATE = ".weight.quant_state.bitsandbytes__nf4"


def _state(tensors: Tensors, **changes: Any) -> None:
    import json

    told = {**json.loads(bytes(tensors[STATE].tolist())), **changes}
    tensors[STATE] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)


@pytest.mark.fault(34)
@pytest.mark.parametrize("what", HOSTILE)
def test_what_makes_no_sense_is_said(what: str) -> None:
    kind, spoil = HOSTILE[what]
    tensors = KINDS[kind][0](torch.randn(16, 64, generator=torch.Generator().manual_seed(0)))
    spoil(tensors)
    with pytest.raises(IntegrityError, match="cannot be dequantised"):
        put_together(tensors, kind, (16, 64), Shard(0), 2, FLOAT)

"""Units: quantized parameters, and those that meet them, are cut on whole blocks of all, where there are enough."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_tools import Checkpoint
from hypothesis import given
from hypothesis import strategies as st
from quantizing import quantize_folder
from safetensors.torch import load_file, save_file

import reshard
from reshard.planning.model.heads import Heads
from reshard.planning.model.units import heads_in_units, units_of
from reshard.sharding.dealing import deal_heads, deal_units, in_units
from reshard.sharding.placement import PackedShard, Ranges, Shard, ranges_of
from reshard.transforms.bundle import Follows, Member, Quantized


def blocks_of(shape: tuple[int, int], rows: int, columns: int) -> Quantized:
    dims = (Follows(0, rows), Follows(1, columns))
    return Quantized("fp8", {}, {"scale": Member("scale", dims)}, tuple((size,) for size in shape))


def test_as_gpt_oss_is_dealt() -> None:
    """2880 features are 90 blocks of 32."""
    assert [(b - a) // 32 for a, b in deal_units(2880, 32, 4)] == [23, 23, 22, 22]
    assert [(b - a) // 32 for a, b in deal_units(2880, 32, 8)] == [12, 12, 11, 11, 11, 11, 11, 11]


@given(size=st.integers(1, 400), unit=st.integers(1, 40), ranks=st.integers(1, 9), packed=st.booleans())
def test_no_unit_is_divided_where_there_are_enough(size: int, unit: int, ranks: int, packed: bool) -> None:
    plain = PackedShard(0, (size, size)) if packed else Shard(0)
    whole = 2 * size if packed else size
    placement = in_units(plain, whole, unit, ranks)
    held = [tuple(ranges_of(placement, whole, rank=rank, world_size=ranks)) for rank in range(ranks)]
    assert sorted(at for of_rank in held for a, b in of_rank for at in range(a, b)) == list(range(whole))
    if -(-size // unit) >= ranks:
        assert all(at % size % unit == 0 for of_rank in held for a, b in of_rank if a < b for at in (a, b))
        assert isinstance(placement, Ranges) or placement == plain
    else:
        assert placement == plain


def test_what_meets_is_cut_together() -> None:
    """An MLP whose down projection has groups of 32 inputs, and gate and up blocks of 48 outputs."""
    shapes = {"m.gate.weight": (576, 64), "m.up.weight": (576, 64), "m.up.bias": (576,), "m.down.weight": (64, 576)}
    styles = {**dict.fromkeys(shapes, "colwise"), "m.down.weight": "rowwise"}
    bundles = {
        "m.gate.weight": blocks_of((576, 64), 48, 64),
        "m.down.weight": blocks_of((64, 576), 64, 32),
    }
    assert units_of(bundles, styles, shapes, {}) == dict.fromkeys(shapes, 96)
    assert units_of({}, styles, shapes, {}) == {}


def test_heads_stay_together() -> None:
    """Heads of 64 in blocks of 128: two KV heads, with their query heads, are a unit."""
    shapes = {"a.q_proj.weight": (512, 512), "a.k_proj.weight": (512, 512), "a.o_proj.weight": (512, 512)}
    styles = {"a.q_proj.weight": "colwise", "a.k_proj.weight": "colwise", "a.o_proj.weight": "rowwise"}
    heads = {name: Heads("a", 8, 8, name != "a.k_proj.weight", True) for name in shapes}
    found = heads_in_units(heads, {name: blocks_of((512, 512), 128, 128) for name in shapes}, styles, shapes)
    assert {of.together for of in found.values()} == {2}
    assert [b - a for a, b in deal_heads(8, 8, 3, together=2).query] == [4, 2, 2]
    assert deal_heads(8, 8, 5, together=2) == deal_heads(8, 8, 5)  # four units are too few


def test_a_plan_cuts_on_whole_blocks(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plain = checkpoint("llama", hidden_size=64, intermediate_size=96)
    planned = reshard.plan(quantize_folder(plain, tmp_path / "source", "fp8"), tp_size=4)
    cut = {bundle.target.name.split(".")[-2]: bundle.target.placement for bundle in planned.bundles}
    bounds = (((0, 32),), ((32, 64),), ((64, 80),), ((80, 96),))
    assert (cut["gate_proj"], cut["up_proj"], cut["down_proj"]) == (
        Ranges(0, bounds),
        Ranges(0, bounds),
        Ranges(1, bounds),
    )


@pytest.mark.parametrize("own", ["k_scale", "v_scale"])
def test_scales_of_a_cache_are_kept(own: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = quantize_folder(checkpoint("llama"), tmp_path / "source", "fp8")
    file, index = sorted(source.glob("*.safetensors"))[0], source / "model.safetensors.index.json"
    name = f"model.layers.0.self_attn.{own[0]}_proj.{own}"
    save_file({**load_file(file), name: torch.ones(1)}, file)
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**places, name: file.name}}))
    assert reshard.plan(source, tp_size=2).unused == (name,)

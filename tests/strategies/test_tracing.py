"""Strategies written from the guide, cut offline: the plan writes what their `partition_tensor` takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from cutting import DTYPES, by_regions, mesh_of, random_bits, same
from own_styles import CUTS, SHAPE, style
from safetensors.torch import load_file

import reshard
from reshard.errors import BadInputError
from reshard.sharding.placement import Explicit, PackedShard, Shard
from reshard.strategies import (
    ParallelInterface,
    get_tensor_shard,
    load_strategies,
)
from reshard.strategies.tracing import placement_on


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CUTS)
def test_what_is_planned_is_what_is_cut(name: str, dtype: torch.dtype) -> None:
    cut, plain = CUTS[name]
    tensor = random_bits(SHAPE, dtype)
    for world_size in (2, 3, 4):
        strategy = style(cut)
        placement = placement_on(strategy, "weight", SHAPE, dtype, world_size)
        assert placement == plain if plain else isinstance(placement, (Explicit, Shard))
        for rank in range(world_size):
            mesh = mesh_of(world_size)
            mesh.get_local_rank = lambda rank=rank: rank
            expected = strategy.partition_tensor(tensor, tensor, "weight", dtype, True, rank, mesh)
            assert same(by_regions(tensor, placement, rank, world_size), expected.data)


def test_a_dtensor_is_made_without_a_process_group() -> None:
    code = """
import sys, torch
sys.path[:0] = sys.argv[1:]
from own_styles import CUTS, SHAPE, style
from reshard.strategies.tracing import placement_on
cut, plain = CUTS["rows"]
assert placement_on(style(cut, use_dtensor=True), "weight", SHAPE, torch.float32, 3) == plain
assert not torch.distributed.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code, *sys.path], check=True, timeout=120)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (lambda p, e, r, m: get_tensor_shard(p, e, m, r, 0) / m.size(), r"computes values \(div\)"),
        (lambda p, e, r, m: get_tensor_shard(p, e, m, r, 0).half(), "computes values"),
        (lambda p, e, r, m: torch.zeros(4, 6), "gives new values"),
        (lambda p, e, r, m: torch.cat([p[:4], torch.zeros(4, 6)]), "computes values"),
        (lambda p, e, r, m: get_tensor_shard(p, e, m, r, 0).t(), "rearranges elements"),
        (lambda p, e, r, m: get_tensor_shard(p, e, m, r, 0).reshape(-1), "rearranges elements"),
        (lambda p, e, r, m: p[r : r + 1], "leaves out elements of weight"),
        (lambda p, e, r, m: p[:, : 5 - r], "leaves out elements of weight"),
        (lambda p, e, r, m: p.no_such_method(), "AttributeError"),
        (lambda p, e, r, m: m.get_group(), "RuntimeError"),
    ],
)
def test_what_cannot_be_planned_is_refused(cut: Any, words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        placement_on(style(cut), "weight", SHAPE, torch.float32, 2)


def test_a_shape_of_ones_does_not_hide_a_transposition() -> None:
    with pytest.raises(BadInputError, match="reshapes the parameter"):
        placement_on(style(lambda p, e, r, m: p.t()), "weight", (5, 1), torch.float32, 2)


def test_converted_verified_and_told(tmp_path: Path) -> None:
    """A cut that no plain placement expresses goes all the way to disk, to the manifest and back to every element."""
    source = pico.save("llama", tmp_path / "source", shard_bytes="1GB")
    mine = ParallelInterface()
    mine.register_strategy("round_robin", style(CUTS["round robin"][0]))
    rules = {"extends": "auto", "lm_head": "round_robin"}
    manifest = reshard.convert(source, tmp_path / "out", tp_size=4, tp_plan=rules, strategies=mine)
    assert manifest.custom == {"round_robin": "Mine"}
    assert reshard.inspect(tmp_path / "out") == manifest
    assert "not one box per rank (lm_head.weight" in manifest.runtime_only[0]
    whole = load_file(source / "model.safetensors")["lm_head.weight"]
    for rank, record in enumerate(manifest.rank_files):
        assert torch.equal(load_file(tmp_path / "out" / record.name)["lm_head.weight"], whole[rank::4])
    reshard.verify(tmp_path / "out", against=source)


def test_one_class_under_a_built_in_name_is_custom_too() -> None:
    mine = ParallelInterface()
    mine.register_strategy("colwise", style(CUTS["columns"][0]))
    assert mine.custom(["rowwise", "colwise", "packed_colwise[2,1]"]) == {"colwise": "Mine"}


@pytest.mark.parametrize("name", ["packed_colwise[4,1,1]", "packed_rowwise[4,1,1]"])
def test_block_sizes_in_a_styles_name(name: str) -> None:
    strategy = ParallelInterface().find(name)
    dim = 0 if "colwise" in name else 1
    assert strategy.placement("weight", (12, 24)) == PackedShard(dim, (8, 2, 2) if dim == 0 else (16, 4, 4))
    if dim == 0:
        assert strategy.placement("bias", (12,)) == PackedShard(0, (8, 2, 2))  # like its weight
    plain = ParallelInterface().find(name.split("[")[0])
    assert plain.placement("weight", (12, 24)) == PackedShard(dim, (6, 6) if dim == 0 else (12, 12))  # even blocks


@pytest.mark.parametrize(
    "name", ["colwise[2,1]", "packed_colwise[]", "packed_colwise[a]", "packed_colwise[-1,2]", "[1]"]
)
def test_block_sizes_that_make_no_sense(name: str) -> None:
    with pytest.raises(BadInputError, match="unknown tensor-parallel style"):
        ParallelInterface().find(name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", "registers no strategy"),
        ("import no_such_module\n", "ModuleNotFoundError"),
        ("def f(:\n", "SyntaxError"),
        (
            "from reshard.strategies import *\nALL_PARALLEL_STYLES.register_strategy('a', RowwiseParallel)\n",
            "an instance",
        ),
        (None, "cannot be read"),
    ],
)
def test_files_that_hold_no_strategies(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(BadInputError, match=words):
        load_strategies(tmp_path / "mine.py")

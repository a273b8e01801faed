"""A resharded folder as a source: its conversions equal, byte for byte, those of the original checkpoint."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from cli_tools import RANK_FILES, Checkpoint, Cli, Refused, flip, reseal, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_tools import add, both_ways
from symbolic_programs import programs, run

import reshard
from reshard.errors import IntegrityError
from reshard.sharding.inverse import invert, once, refined_shape, through
from reshard.sharding.regions import Region, contiguous_strides, covers
from reshard.strategies.symbolic import RegionTensor


@settings(max_examples=400, deadline=None)
@given(programs(), programs())
def test_any_program_can_be_run_on_what_another_left(one: tuple, other: tuple) -> None:
    """Against torch: each element that one program keeps and another wants is found where the first has put it."""
    (shape, first), (_, second) = one, other
    size = torch.Size(shape).numel()
    source = torch.arange(size).reshape(shape)
    kept, kept_regions = source, RegionTensor.of_source("source", shape, torch.int64)
    for step in first:
        kept, kept_regions = run(kept, step), run(kept_regions, step)
    wanted, wanted_regions = source, RegionTensor.of_source("source", shape, torch.int64)
    for step in second:
        try:
            wanted, wanted_regions = run(wanted, step), run(wanted_regions, step)
        except (RuntimeError, IndexError, ValueError):  # a step drawn for another shape
            break
    held = kept.contiguous().reshape(-1).clone()
    refined = refined_shape(shape, kept_regions.regions)
    backs = [b for r in kept_regions.regions for b in invert(r, "held", tuple(kept.shape), refined)]
    parts = once(backs, refined)
    found = torch.full(tuple(wanted.shape), -1)
    for region in wanted_regions.regions:
        for part in through(region, tuple(wanted.shape), parts, refined):
            box = tuple(slice(start, start + extent) for start, extent in zip(part.target_start, part.extent))
            found[box] = torch.as_strided(held, part.extent, part.strides, part.offset)
    assert torch.equal(found, torch.where(torch.isin(wanted, held), wanted, -1))


@given(st.lists(st.tuples(*[st.tuples(st.integers(0, 5), st.integers(1, 6))] * 2), min_size=1, max_size=6))
def test_what_overlaps_is_taken_once(drawn: list) -> None:
    shape = (11, 11)
    regions = [
        Region(str(i), 100 * i, (11, 1), (rows, columns), (top, left))
        for i, ((top, rows), (left, columns)) in enumerate(drawn)
    ]

    def painted(regions: Any) -> torch.Tensor:
        picture = torch.full(shape, -1)
        for region in reversed(regions):  # so the first is on top
            box = tuple(slice(s, s + e) for s, e in zip(region.target_start, region.extent))
            picture[box] = region.offset + torch.as_strided(torch.arange(121), region.extent, region.strides)
        return picture

    found = once(regions, shape)
    assert torch.equal(painted(found), painted(regions))
    assert sum(region.size for region in found) == (painted(regions) >= 0).sum()


def test_a_tensor_that_is_covered_keeps_its_regions() -> None:
    halves = [Region("a", 0, (1,), (4,), (0,)), Region("b", 0, (1,), (4,), (4,))]
    assert once([*halves, *halves], (8,)) == tuple(halves)
    assert covers(once([*halves, Region("c", 0, contiguous_strides((8,)), (8,), (0,))], (8,)), (8,))


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    source = pico.save(family, tmp_path / "source")
    for first, second in ((1, 2), (2, 4), (4, 2), (4, 1)):
        both_ways(source, tmp_path, {"tp_size": first}, {"tp_size": second})


def test_uneven_and_shared_heads(tmp_path: Path) -> None:
    source = pico.save("llama", tmp_path / "heads", num_key_value_heads=2)
    for first, second in itertools.permutations((1, 2, 4), 2):
        both_ways(source, tmp_path, {"tp_size": first}, {"tp_size": second})


def test_experts_on_ranks_and_unused_tensors(tmp_path: Path) -> None:
    source = pico.save("qwen3_moe", tmp_path / "experts")
    add(source, {"unknown.weight": torch.randn(3, 5), "unknown.scale": torch.tensor(2.0)})
    grids = [{"tp_size": 2}, {"tp_size": 4, "ep_size": 2}, {"tp_size": 2, "ep_size": 4}]
    for first, second in itertools.permutations(grids, 2):
        both_ways(source, tmp_path, first, second)
    both_ways(source, tmp_path, {"tp_size": 4}, {"tp_size": 2, "drop_unused": True})
    both_ways(source, tmp_path, {"tp_size": 4, "drop_unused": True}, {"tp_size": 2, "drop_unused": True})


@pytest.mark.parametrize("twice", [False, True])
def test_tied_weights(twice: bool, tmp_path: Path) -> None:
    source = pico.save("llama", tmp_path / "source", tie_word_embeddings=True)
    if twice:
        from safetensors.torch import load_file

        whole = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
        add(source, {"lm_head.weight": whole["model.embed_tokens.weight"]})
    both_ways(source, tmp_path, {"tp_size": 2}, {"tp_size": 4})
    apart = {"tp_plan": {"extends": "auto", "model.embed_tokens": "replicate"}}
    both_ways(source, tmp_path, {"tp_size": 2, **apart}, {"tp_size": 4, **apart})
    both_ways(source, tmp_path, {"tp_size": 2}, {"tp_size": 4, **apart})


def test_casts(tmp_path: Path) -> None:
    source = pico.save("llama", tmp_path / "source")
    both_ways(source, tmp_path, {"tp_size": 2}, {"tp_size": 4, "dtype": "bfloat16"})
    both_ways(source, tmp_path, {"tp_size": 2, "dtype": "bfloat16"}, {"tp_size": 4, "dtype": "bfloat16"})


def test_what_is_lost_is_said(tmp_path: Path, refused: Refused) -> None:
    source = pico.save("llama", tmp_path / "source")
    add(source, {"unknown": torch.zeros(2)})
    reshard.convert(source, tmp_path / "cast", tp_size=2, dtype="bfloat16")
    reshard.convert(source, tmp_path / "dropped", tp_size=2, drop_unused=True)
    for command in ("convert", "plan"):
        out = [tmp_path / "again"] if command == "convert" else []
        refused(
            *(3, [command, tmp_path / "cast", *out, "--tp-size", 4], "was cast from float32 to bfloat16"),
            hint="give --dtype bfloat16 again",
        )
        refused(
            *(3, [command, tmp_path / "dropped", *out, "--tp-size", 4], "unknown was dropped"),
            hint="drop it again with --drop-unused",
        )


@pytest.fixture
def made(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    reshard.convert(checkpoint("llama"), tmp_path / "tp2", tp_size=2)
    return tmp_path / "tp2"


def test_the_commands(made: Path, checkpoint: Checkpoint, tmp_path: Path, cli: Cli) -> None:
    expected = reshard.convert(checkpoint("llama"), tmp_path / "tp4", tp_size=4)
    planned = cli("plan", made, "--tp-size", 4)
    assert (planned.code, planned.err) == (0, "")
    assert planned.out == cli("plan", checkpoint("llama"), "--tp-size", 4).out
    result = cli("convert", made, tmp_path / "again", "--tp-size", 4)
    assert (result.code, result.err) == (0, "")
    assert tree(tmp_path / "again") == tree(tmp_path / "tp4")
    assert reshard.verify(tmp_path / "again", against=checkpoint("llama")).elements
    assert reshard.inspect(tmp_path / "again") == expected


def test_in_its_own_place(made: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    reshard.convert(checkpoint("llama"), tmp_path / "tp4", tp_size=4)
    reshard.convert(made, made, tp_size=4, overwrite=True)
    assert tree(made) == tree(tmp_path / "tp4")
    assert sorted(os.listdir(tmp_path)) == ["tp2", "tp4"]


@pytest.mark.parametrize("position", [-1, 4096, 20])
def test_an_altered_rank_file_is_not_cut_again(position: int, made: Path, tmp_path: Path) -> None:
    flip(made / RANK_FILES[1], position)
    with pytest.raises(IntegrityError, match="shard-00002"):
        reshard.convert(made, tmp_path / "again", tp_size=4)
    assert os.listdir(tmp_path) == ["tp2"]


def test_a_rank_file_that_is_not_whole(made: Path, tmp_path: Path) -> None:
    os.truncate(made / RANK_FILES[1], 5000)
    with pytest.raises(IntegrityError, match=r"shard-00002\S+: expected \d+ bytes, got 5000"):
        reshard.convert(made, tmp_path / "again", tp_size=4)
    (made / RANK_FILES[1]).unlink()
    with pytest.raises(IntegrityError, match=r"shard-00002\S+: is missing"):
        reshard.convert(made, tmp_path / "again", tp_size=4)


def test_a_small_file_that_was_altered(made: Path, tmp_path: Path) -> None:
    flip(made / "generation_config.json", 5)
    with pytest.raises(IntegrityError, match=r"generation_config\.json: its content was altered"):
        reshard.convert(made, tmp_path / "again", tp_size=4)


def test_a_manifest_whose_parameters_leave_elements_out(made: Path, tmp_path: Path) -> None:
    reseal(made, lambda content: content["parameters"].pop())
    with pytest.raises(IntegrityError):
        reshard.convert(made, tmp_path / "again", tp_size=4)
    assert os.listdir(tmp_path) == ["tp2"]


def test_verify_against_a_resharded_folder(made: Path, refused: Refused) -> None:
    refused(3, ["verify", made, "--against", made], "already resharded", hint="start from the checkpoint")

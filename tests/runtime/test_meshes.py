"""Meshes of several axes: the model is cut over `tp` and repeated along the others, and a failure reaches all ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli_tools import Checkpoint, configure, flip
from places import WORKERS
from torchrun_tools import on_ranks

import reshard
from reshard.errors import TopologyError
from runtime.distributed.ranks import RankInfo
from runtime.distributed.replicas import side_by_side

IDS = torch.arange(3, 12).repeat(2, 1)
SOURCES = {"heads": ("llama", {"num_key_value_heads": 1}), "experts": ("qwen3_moe", {})}
Ranks = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """The output of each of four ranks."""
    root = tmp_path_factory.mktemp("meshes")
    for size in (1, 2, 4):
        reshard.convert(checkpoint("llama"), root / f"tp{size}", tp_size=size, sync=False)
    family, options = SOURCES["heads"]
    reshard.convert(checkpoint(family, **options), root / "heads", tp_size=2, sync=False)
    reshard.convert(checkpoint("qwen3_moe"), root / "experts", tp_size=2, ep_size=2, sync=False)
    damaged = shutil.copytree(root / "tp2", root / "damaged")
    flip(damaged / "shard-00002-model-00001-of-00001.safetensors", -1)
    configure(Path(shutil.copytree(root / "tp2", root / "configured")), rms_norm_eps=0.5)
    names = ("tp1", "tp2", "tp4", "heads", "experts", "damaged", "configured")
    folders = {name: str(root / name) for name in names}
    (root / "folders.json").write_text(json.dumps(folders))
    done = on_ranks(4, str(WORKERS / "meshes.py"), str(root / "folders.json"), str(root / "out"))
    assert done.returncode == 0, done.stderr
    return [torch.load(root / f"out.{rank}") for rank in range(4)]


@pytest.mark.parametrize(
    ("case", "replicas"),
    [
        ("made here", [0, 0, 1, 1]),
        ("dp tp", [0, 0, 1, 1]),
        ("pp dp tp", [0, 0, 1, 1]),
        ("tp pp", [0, 1, 0, 1]),
        ("shared heads", [0, 0, 1, 1]),
        ("experts", [0, 0, 1, 1]),
        ("split sequence", [0, 0, 1, 1]),
    ],
)
def test_every_replica_computes_what_one_process_does(
    case: str, replicas: list[int], ranks: Ranks, checkpoint: Checkpoint
) -> None:
    family, options = SOURCES.get({"shared heads": "heads"}.get(case, case), ("llama", {}))
    single = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(family, **options))
    with torch.inference_mode():
        expected = single(IDS).logits
    assert [found[case]["replica"] for found in ranks] == [(index, 2) for index in replicas]
    for rank, found in enumerate(ranks):
        assert (found[case]["logits"] - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert torch.equal(found[case]["whole"], single.state_dict()["model.layers.0.self_attn.k_proj.weight"])
        assert found[case]["mesh"] == tuple(other for other in range(4) if replicas[other] == replicas[rank])
        assert found[case]["taken"] == (["b", "d"] if replicas[rank] else ["a", "c", "e"])
        assert found[case]["gathered"] == (["A", "B", "C", "D", "E"] if rank == 0 else None)


def test_a_mesh_and_its_device(ranks: Ranks) -> None:
    for found in ranks:
        assert torch.equal(found["its device"]["logits"], found["dp tp"]["logits"])


def test_one_axis_of_a_mesh_is_a_model_by_itself(ranks: Ranks) -> None:
    for rank, found in enumerate(ranks):
        assert found["its tp alone"]["replica"] == (0, 1)
        assert torch.equal(found["its tp alone"]["logits"], found["dp tp"]["logits"])
        assert found["its tp alone"]["gathered"] == (["A", "B", "C", "D", "E"] if rank in (0, 2) else None)


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("no names", "TopologyError", "the mesh has no axis 'tp': its axes are without names"),
        ("no tp", "TopologyError", "the mesh has no axis 'tp': its axes are dp, model"),
        ("another size", "TopologyError", "was made for 4 ranks, not for 2"),
        ("with replicas", "UsageError", "dp_size is for a load without a mesh"),
        ("another device", "UsageError", "the mesh is of cpu, and device is cuda:0"),
        ("another configuration", "IntegrityError", "config.json: expected"),
        ("uneven replicas", "TopologyError", "4 ranks do not make 3 replicas of equal size"),
        ("damaged on one rank", "IntegrityError", "rank 3: "),
    ],
)
def test_refused_alike_on_every_rank(case: str, error: str, words: str, ranks: Ranks) -> None:
    for found in ranks:
        assert found[case]["error"] == error
        assert words in found[case]["words"]
        assert found[case]["words"] == ranks[0][case]["words"]


def test_ranks_that_are_not_on_the_mesh(ranks: Ranks) -> None:
    for rank, found in enumerate(ranks):
        if rank in (0, 2):
            assert found["two of four"]["words"] == f"rank {rank} is not on the mesh that it loads on"
        else:
            assert found["two of four"]["replica"] == (rank // 2, 2)
            assert found["two of four"]["gathered"] == (["A", "B", "C", "D", "E"] if rank == 1 else None)
            assert torch.allclose(found["two of four"]["logits"], found["dp tp"]["logits"], rtol=1e-5, atol=1e-5)


def test_replicas_of_ranks_in_a_row() -> None:
    places = [side_by_side(RankInfo(rank, 6, 0), 3) for rank in range(6)]
    assert [(place.index, place.rank) for place in places] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    with pytest.raises(TopologyError, match="do not make 0 replicas"):
        side_by_side(RankInfo(0, 6, 0), 0)

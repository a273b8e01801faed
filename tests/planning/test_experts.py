"""Experts cut by expert: possible meshes, the placement of parameters on them, and refusals."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import transformers

import reshard
from reshard.errors import TopologyError
from reshard.sharding.placement import Nested, PackedShard, Placement, Replicate, Shard
from reshard.sharding.topology import Topology

HALVES = PackedShard(1, (24, 24))  # gate|up, 24 columns each


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.save("qwen3_moe", tmp_path_factory.mktemp("moe") / "source")


@pytest.mark.parametrize(
    ("tp", "ep", "world_size", "tp_row", "ep_row"),
    [(4, 1, 4, 1, 4), (4, 2, 4, 1, 2), (4, 4, 4, 1, 1), (2, 4, 4, 2, 1), (1, 4, 4, 4, 1), (1, 1, 1, 1, 1)],
)
def test_the_two_axes_span_the_same_ranks(tp: int, ep: int, world_size: int, tp_row: int, ep_row: int) -> None:
    topology = Topology(tp, ep)
    assert (topology.world_size, topology.tp_row, topology.ep_row) == (world_size, tp_row, ep_row)


@pytest.mark.parametrize(("tp", "ep"), [(0, 1), (2, 0), (-1, 1), (2, 3), (4, 6)])
def test_axes_that_do_not_share_ranks(tp: int, ep: int) -> None:
    with pytest.raises(TopologyError):
        Topology(tp, ep)


# Placements of the experts' gate|up and down, and of a query projection.
LAYOUTS: dict[tuple[int, int], tuple[Placement, Placement, Placement]] = {
    (4, 1): (HALVES, Shard(2), Shard(0)),
    (4, 4): (Shard(0), Shard(0), Shard(0)),
    (2, 4): (Shard(0), Shard(0), Nested(Shard(0), Replicate(), 2)),
    (1, 4): (Shard(0), Shard(0), Replicate()),
    (4, 2): (Nested(Shard(0), HALVES, 2), Nested(Shard(0), Shard(2), 2), Shard(0)),
}


@pytest.mark.parametrize(("tp", "ep"), LAYOUTS)
def test_placements(tp: int, ep: int, source: Path, tmp_path: Path) -> None:
    manifest = reshard.convert(source, tmp_path / "out", tp_size=tp, ep_size=ep)
    assert reshard.inspect(tmp_path / "out") == manifest
    assert manifest.topology == Topology(tp, ep)
    assert len(manifest.rank_files) == 4
    placements = {p.name.removeprefix("model.layers.0."): p.placement for p in manifest.parameters}
    names = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.q_proj.weight")
    assert tuple(placements[name] for name in names) == LAYOUTS[tp, ep]
    assert manifest.hooks["model.layers.0.mlp.experts"] == ("ep_dispatch_experts" if ep > 1 else "moe_tp_experts")
    reasons = {p.reason for p in manifest.parameters if "q_proj" in p.name}
    assert reasons == {"tp is 1" if tp == 1 else None}
    reshard.verify(tmp_path / "out", against=source)


@pytest.mark.parametrize(("tp", "ep"), [(2, 2), (2, 4), (1, 2)])
def test_whole_experts_open_in_plain_transformers(tp: int, ep: int, source: Path, tmp_path: Path) -> None:
    """Cut by expert, each parameter is one box per rank; cut inside, gate|up is two, and the folder says so."""
    assert reshard.plan(source, tp_size=2).runtime_only != ()
    manifest = reshard.convert(source, tmp_path / "out", tp_size=tp, ep_size=ep)
    assert manifest.runtime_only == ()
    if not importlib.util.find_spec("transformers.distributed.checkpoint"):
        pytest.skip("this transformers does not read rank files")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = transformers.AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("family", "options", "sizes", "words"),
    [
        ("qwen3_moe", {}, {"tp_size": 3, "ep_size": 2}, "do not share ranks"),
        ("qwen3_moe", {}, {"tp_size": 8, "ep_size": 8}, "has only 4 experts"),
        ("qwen3_moe", {}, {"tp_size": 9}, "has only 8 query heads, or blocks of them"),
        ("llama", {}, {"tp_size": 2, "ep_size": 2}, "LlamaForCausalLM has no expert-parallel plan"),
        ("qwen3_moe", {"tp_plan": {"lm_head": "colwise_rep"}}, {"tp_size": 4, "ep_size": 2}, "no rule that cuts it"),
    ],
)
def test_refused(family: str, options: dict[str, Any], sizes: dict[str, int], words: str, tmp_path: Path) -> None:
    source = pico.save(family, tmp_path / "source")
    with pytest.raises(TopologyError, match=words) as caught:
        reshard.plan(source, **sizes, **options)
    assert caught.value.hint

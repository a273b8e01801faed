"""The number of ranks that a model needs, so that each can hold its part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Checkpoint, Cli, assert_one_error

import reshard
from reshard.cli.common import Bytes
from reshard.errors import TopologyError, UsageError
from reshard.planning.plan import plan_layouts


def held(source: Path, **options: Any) -> int:
    """Return the bytes of the largest rank's parameters, by the layout of its file."""
    planned = reshard.plan(source, **options)
    layouts = plan_layouts(planned)[: planned.world_size]
    return max(sum(slot.tensor.nbytes for slot in layout.slots) for layout in layouts)


# Everything of a GPU, for a cache of one token: what is left are the weights, and a few bytes.
WEIGHTS = {"utilization": 1.0, "max_model_len": 1}


def needed(source: Path, **options: Any) -> int:
    planned = reshard.plan(source, **options)
    per_token = max(rank["kv_bytes_per_token"] for rank in planned.to_dict()["ranks"])
    return held(source, **options) + per_token


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "phi3"])
def test_the_fewest_ranks_that_can_hold_it(family: str, checkpoint: Checkpoint) -> None:
    source = checkpoint(family)
    sizes = {tp: needed(source, tp_size=tp) for tp in (1, 2, 3, 4)}
    for tp, size in sizes.items():
        assert reshard.plan(source, gpu_memory=size, **WEIGHTS).world_size == tp
        assert reshard.plan(source, gpu_memory=size - 1, **WEIGHTS).world_size > tp
    with pytest.raises(TopologyError, match=r"no number of ranks up to 64 fits 100 bytes each, of which 90%"):
        reshard.plan(source, gpu_memory=100)


def test_what_a_server_keeps_beside_the_weights(checkpoint: Checkpoint) -> None:
    source = checkpoint("llama")  # 2 layers of 4 KV heads of 4, at most 64 tokens
    weights = held(source, tp_size=1)
    cache = 2 * 2 * 4 * 4 * 4 * 64
    for options, bytes_needed in (
        ({}, cache),
        ({"batch_size": 5}, 5 * cache),
        ({"max_model_len": 32}, cache // 2),
        ({"max_model_len": 6400}, 100 * cache),
        ({"kv_dtype": "fp8"}, cache // 4),
        ({"kv_dtype": "bf16", "batch_size": 2}, cache),
    ):
        whole = weights + bytes_needed
        assert reshard.plan(source, gpu_memory=whole, utilization=1.0, **options).world_size == 1
        assert reshard.plan(source, gpu_memory=whole - 1, utilization=1.0, **options).world_size == 2
        assert reshard.plan(source, gpu_memory=2 * whole, utilization=0.5, **options).world_size == 1
        assert reshard.plan(source, gpu_memory=2 * whole - 2, utilization=0.5, **options).world_size == 2
    assert reshard.plan(source, gpu_memory=int(1.12 * (weights + cache))).world_size == 1
    assert reshard.plan(source, gpu_memory=int(1.11 * (weights + cache))).world_size == 2


def test_with_experts_on_ranks(checkpoint: Checkpoint) -> None:
    source = checkpoint("qwen3_moe")
    size = needed(source, tp_size=2, ep_size=4)
    assert size < held(source, tp_size=1, ep_size=4)
    planned = reshard.plan(source, gpu_memory=size, ep_size=4, **WEIGHTS)
    assert (planned.topology.tp, planned.topology.ep) == (2, 4)


@pytest.mark.parametrize("options", [{}, {"tp_size": 2, "gpu_memory": 10**9}])
def test_either_ranks_or_memory(options: dict[str, int], checkpoint: Checkpoint) -> None:
    with pytest.raises(UsageError, match="--tp-size"):
        reshard.plan(checkpoint("llama"), **options)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("1.5gib", 3 << 29),
        ("80 G", 80 * 10**9),
        ("512", 512),
        ("7kB", 7000),
        ("2TiB", 2 << 40),
        ("24e9", 24 * 10**9),
        ("1.5PB", 15 * 10**14),
    ],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert Bytes().convert(text, None, None) == size


def test_the_command(checkpoint: Checkpoint, cli: Cli) -> None:
    result = cli("plan", checkpoint("llama"), "--gpu-memory", "1GB", "--format", "json")
    assert json.loads(result.out)["world_size"] == 1
    for size in ("much", "1e999", "9" * 400, "-1GB"):
        assert cli("plan", checkpoint("llama"), "--gpu-memory", size).code == 2
    both = cli("plan", checkpoint("llama"), "--gpu-memory", "24GB", "--tp-size", 2)
    assert_one_error(both, 2, "number of ranks", hint="--tp-size 2, or --gpu-memory 24GB")
    assert_one_error(cli("plan", checkpoint("llama"), "--gpu-memory", 24), 9, "24 bytes", hint="--gpu-memory 24GB")

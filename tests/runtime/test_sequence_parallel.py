"""A model with its sequence split between the blocks computes what the single process does, and is really split."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import families
import pico
import pytest
import torch
import transformers
from cli_tools import Checkpoint
from places import WORKERS
from sequence_tools import outputs
from torchrun_tools import on_ranks

import reshard
from reshard.checkpoint.architecture import meta_model
from reshard.errors import BadInputError
from reshard.resharded.manifest import read_manifest
from reshard.sharding.placement import shard_bounds
from reshard.strategies import ALL_PARALLEL_STYLES, RowwiseParallel, load_strategies
from runtime.model.sequence import split_points

# Norms that split the sequence themselves although the model does not; one is behind the layers.
STYLED = {"extends": "auto", "layers.*.input_layernorm": "sequence_parallel", "norm": "sequence_parallel"}
# name → family, its options, and options of its conversion
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, {}),
    "llama-styled": ("llama", {}, {"tp_plan": STYLED}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}, {}),
    "llama-nine-heads": ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "gemma2": ("gemma2", {}, {}),  # norms behind the blocks too
    "mistral": ("mistral", {}, {}),
    "gpt_neox": ("gpt_neox", {}, {}),  # both blocks in parallel
    "glm4_moe": ("glm4_moe", {}, {}),  # a shared expert, and a dense layer
    "qwen3_moe": ("qwen3_moe", {}, {}),
    "qwen3_moe-ep": ("qwen3_moe", {}, {"ep_size": 2}),
    "qwen3_moe-five-experts": ("qwen3_moe", {"num_experts": 5}, {"ep_size": 4}),
    "qwen3_moe-wide-ep": ("qwen3_moe", {}, {"tp_size": 2, "ep_size": 4}),  # two ranks get the same tokens
}
AT_TWO = ["llama", "llama-one-kv-head", "gpt_neox", "qwen3_moe-ep"]
AT_FOUR = [name for name in VARIANTS if name not in AT_TWO]
DENSE, EXPERTS = {"llama", "llama-biased", "qwen3", "gemma2"}, {"qwen3_moe", "qwen3_moe-ep"}  # collectives are counted
ALL = {**{family: (family, {}, {}) for family in pico.FAMILIES}, **VARIANTS}


def inputs() -> list[dict[str, torch.Tensor]]:
    """Return lengths that the ranks divide or not, that leave a rank nothing or stay unsplit; and a padded input."""
    found = []
    for length in (12, 5, 3, 13):
        ids = torch.randint(3, 130, (2, length), generator=torch.Generator().manual_seed(length))
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    found[-1]["input_ids"][0, :3] = 0
    found[-1]["attention_mask"][0, :3] = 0
    return found


@pytest.fixture(scope="module")
def source(checkpoint: Checkpoint) -> Callable[[str], Path]:
    return lambda name: checkpoint(ALL[name][0], **ALL[name][1])


@pytest.fixture(scope="module")
def single(source: Callable[[str], Path]) -> Callable[[str], list[dict[str, Any]]]:
    """The results of the single-process model for each input."""
    made: dict[Path, list[dict[str, Any]]] = {}

    def compute(name: str) -> list[dict[str, Any]]:
        if source(name) not in made:
            model = transformers.AutoModelForCausalLM.from_pretrained(source(name))
            with torch.inference_mode():
                made[source(name)] = [outputs(model, arguments) for arguments in inputs()]
        return made[source(name)]

    return compute


def run(root: Path, world_size: int, names: Iterable[str], source: Callable[[str], Path]) -> list[dict[str, Any]]:
    """Return the output of each rank."""
    jobs = []
    torch.save(inputs(), root / "inputs")
    for name in names:
        reshard.convert(source(name), root / name, **{"tp_size": world_size, **ALL[name][2]}, sync=False)
        counted = name in DENSE | EXPERTS
        jobs.append({"name": name, "folder": str(root / name), "inputs": str(root / "inputs"), "counted": counted})
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = on_ranks(world_size, str(WORKERS / "sequence.py"), str(root / "jobs.json"), str(root / "out"))
    assert done.returncode == 0, done.stderr
    return [torch.load(root / f"out.{rank}") for rank in range(world_size)]


@pytest.fixture(scope="module", params=[AT_TWO, AT_FOUR], ids=["tp2", "tp4"])
def ranks(request: pytest.FixtureRequest, source: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    world_size = 2 if request.param is AT_TWO else 4
    return run(tmp_path_factory.mktemp("ranks"), world_size, request.param, source)


def assert_parity(ranks: list[dict[str, Any]], single: Callable[[str], list[dict[str, Any]]]) -> None:
    for found in ranks:
        for name, result in found.items():
            for got, expected in zip(result["outputs"], single(name), strict=True):
                error = (got["logits"] - expected["logits"]).abs().max() / expected["logits"].abs().max()
                assert error <= 1e-5, (name, expected["logits"].shape, error)
                assert got["tokens"] == expected["tokens"], name


def test_logits_and_tokens_equal_single_process(ranks: Any, single: Any) -> None:
    assert_parity(ranks, single)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_pico_family(world_size: int, source: Any, single: Any, tmp_path: Path) -> None:
    assert_parity(run(tmp_path, world_size, pico.FAMILIES, source), single)


def test_each_rank_has_its_tokens_between_the_blocks(ranks: Any) -> None:
    for rank, found in enumerate(ranks):
        for name, result in found.items():
            size, place = (2, rank // 2) if name == "qwen3_moe-wide-ep" else (len(ranks), rank)
            start, stop = shard_bounds(12, rank=place, world_size=size)
            assert {*result["norms"].values()} == {stop - start}, name


def test_hidden_states_that_are_asked_for_are_whole(ranks: Any) -> None:
    for found in ranks:
        for result in found.values():
            assert {shape[1] for shape in result["hidden"]} == {12}


def calls_of(names: set[str], ranks: list[dict[str, Any]]) -> list[dict[str, dict[str, int]]]:
    found = [rank[name]["calls"] for rank in ranks for name in names if name in rank]
    assert found
    return found


def test_sums_are_scattered_and_inputs_gathered(ranks: Any) -> None:
    """Each sum of two blocks in two layers becomes a scattered one, with a gather in front.

    gloo's scattered sum is an exchange of parts. One more gather joins the sequence behind the layers.
    """
    for calls in calls_of(DENSE, ranks):
        split, whole, step = (calls[kind] for kind in ("split", "whole", "step"))
        assert whole["allreduce_"] - split.get("allreduce_", 0) == 4
        assert split["alltoall_base_"] == 4
        assert split["_allgather_base_"] - whole["_allgather_base_"] == 5
        assert step == whole


def test_the_sum_of_experts_is_cut_behind_them(ranks: Any) -> None:
    """The sum covers tokens without their sequence, so the block keeps all of it and its reduction."""
    for calls in calls_of(EXPERTS, ranks):
        split, whole = calls["split"], calls["whole"]
        assert split["alltoall_base_"] == 3  # attention, and the MLP of the layer without experts
        assert whole["allreduce_"] - split["allreduce_"] == 3


def points(folder: Path, strategies: Any = ALL_PARALLEL_STYLES) -> Any:
    manifest = read_manifest(folder)
    return split_points(meta_model(folder, dtype=manifest.dtype), manifest.hooks, strategies)


MINE = """
from reshard.strategies import ALL_PARALLEL_STYLES, RowwiseParallel

class Mine(RowwiseParallel):
    pass

ALL_PARALLEL_STYLES.register_strategy("mine", Mine())
"""


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"extends": "auto", "layers.*.mlp.down_proj": "mine"}, "mlp.down_proj has a style that is not built in, mine"),
        ({"layers.*.self_attn.o_proj": "rowwise_split_input"}, "layers.0.mlp is neither a norm nor a block"),
    ],
)
def test_what_stands_in_the_way_is_named(plan: Any, words: str, source: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    before = dict(ALL_PARALLEL_STYLES._registered)
    try:
        strategies = load_strategies(tmp_path / "mine.py")
        assert isinstance(strategies["mine"], RowwiseParallel)
        reshard.convert(source("llama"), tmp_path / "out", tp_size=2, tp_plan=plan, strategies=strategies, sync=False)
        with pytest.raises(BadInputError, match=words):
            points(tmp_path / "out", strategies)
    finally:
        ALL_PARALLEL_STYLES._registered = before


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("t5gemma", "is not a decoder with one stack of layers"),
        ("deepseek_v4", "attn_hc is neither a norm nor a block"),  # its layers keep several streams side by side
        ("qwen4_exp", "layers of qwen4_exp_text keep several streams side by side"),
        ("qwen4_exp_text", "layers of qwen4_exp_text keep several streams side by side"),
        ("neomme", "layers of neomme mix what the first layer was given"),
    ],
)
def test_other_architectures_are_refused(family: str, words: str) -> None:
    with torch.device("meta"):
        model = families.build(family)
    layers = [f"model.layers.{i}" for i in range(len(model.get_decoder().layers))]
    hooks = {f"{layer}.{own}": "rowwise" for layer in layers for own in ("self_attn.o_proj", "mlp.down_proj")}
    with pytest.raises(BadInputError, match=words) as found:
        split_points(model, hooks, ALL_PARALLEL_STYLES)
    assert "load it without" in str(found.value.hint)

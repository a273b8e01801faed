"""A loaded model's parameters are the source's bytes in any placement; and the model is saved as the source."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from cli_tools import Checkpoint
from places import WORKERS
from safetensors.torch import load_file
from torchrun_tools import on_ranks

import reshard
from reshard.errors import IntegrityError
from reshard.resharded.targets import Target
from reshard.sharding.placement import Replicate
from reshard.sharding.regions import Region
from runtime.model.source_tensors import groups

IDS = torch.arange(3, 12).repeat(2, 1)
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"intermediate_size": 50, "vocab_size": 131, "attention_bias": True}, {}),  # uneven
    "llama-tied": ("llama", {"tie_word_embeddings": True}, {}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}, {}),  # shared by all ranks
    "llama-nine-heads": ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}, {}),
    "phi3": ("phi3", {}, {}),
    "gpt_neox": ("gpt_neox", {}, {}),  # renamed while loading
    "mixtral": ("mixtral", {}, {}),  # experts fused while loading
    "mixtral-uneven": ("mixtral", {"intermediate_size": 22}, {}),  # blocks that 4 does not divide
    "qwen3_moe-ep": ("qwen3_moe", {}, {"ep_size": 2}),
    "glm4_moe-bf16": ("glm4_moe", {"dtype": torch.bfloat16}, {}),  # a router bias that is loaded in fp32
}


@pytest.fixture(scope="module")
def source(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda name: checkpoint(VARIANTS[name][0], **VARIANTS[name][1])


ON = {  # number of ranks → variants, and the kinds of their layouts
    2: (
        ["llama-tied", "llama-one-kv-head", "mixtral", "glm4_moe-bf16"],
        {"Replicate", "Shard", "_StridedShard", "Shard Replicate"},
    ),
    4: (
        ["llama", "llama-nine-heads", "phi3", "gpt_neox", "mixtral-uneven", "qwen3_moe-ep"],
        {"Replicate", "Shard", "Shard Shard", "Shard _StridedShard", "local"},
    ),
}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, source: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of the saved models, and the output of each rank."""
    root = tmp_path_factory.mktemp(f"tp{request.param}")
    jobs = []
    for name in ON[request.param][0]:
        reshard.convert(source(name), root / name, tp_size=request.param, **VARIANTS[name][2], sync=False)
        paths = {"folder": root / name, "source": source(name), "saved": root / "saved" / name}
        slow = name == "llama-tied"
        jobs.append({"name": name, "slow": slow, **{key: str(path) for key, path in paths.items()}})
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = on_ranks(request.param, str(WORKERS / "round_trips.py"), str(root / "jobs.json"), str(root / "out"))
    assert done.returncode == 0, done.stderr
    return root / "saved", [torch.load(root / f"out.{rank}") for rank in range(request.param)]


def test_every_layout_goes_to_every_other_and_back(ranks: Any) -> None:
    """The worker compares the layouts; this test checks that it met every kind."""
    _, ranks = ranks
    for found in ranks:
        kinds = {kind for result in found.values() for kind in result["kinds"]}
        assert kinds == ON[len(ranks)][1]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def test_a_saved_model_is_the_source(ranks: Any, source: Any) -> None:
    for name in ranks[1][0]:
        assert_same(source(name), ranks[0] / name)


def assert_same(source: Path, saved: Path) -> None:
    before, after = tensors(source), tensors(saved)
    assert after.keys() == before.keys()
    for tensor, value in before.items():
        assert after[tensor].dtype == value.dtype
        assert torch.equal(after[tensor], value), tensor
    assert not list(saved.glob("*.part"))
    # Not grouped_mm, which cannot take the uneven sizes.
    options = {"experts_implementation": "eager"}
    one, other = (transformers.AutoModelForCausalLM.from_pretrained(path, **options) for path in (source, saved))
    assert type(one) is type(other)
    assert one.dtype == other.dtype
    with torch.inference_mode():
        assert torch.equal(one(IDS).logits, other(IDS).logits)
    names = {path.name for path in saved.iterdir()}
    assert names >= {"config.json", "generation_config.json"}
    assert ("model.safetensors.index.json" in names) == ("model.safetensors" not in names)


def test_what_cannot_be_saved_is_refused_on_every_rank(ranks: Any) -> None:
    for rank, found in enumerate(ranks[1]):
        told = "rank 0: " if rank else ""
        for name, result in found.items():
            assert result["again"].startswith(f"DestinationExistsError {told}{ranks[0] / name}")
            assert result["again"].endswith("is there already")
            assert result["full disk"].startswith(f"StorageError {told}/proc/nowhere: ")
            assert result["argument"] == "UsageError save_pretrained of a resharded model does not take state_dict"
            assert result["nobody writes"].endswith("does not take is_main_process")
            assert not (ranks[0] / f"{name}-2").exists()
            assert result["no such name"] == "UsageError the files hold no parameter or buffer lm_haed.weight"


@pytest.mark.parametrize(
    "regions",
    [
        [Region("w", 0, (1,), (3,), (0,))],
        [Region("w", 0, (1,), (3,), (0,)), Region("w", 1, (1,), (2,), (3,))],  # one element too many
        [Region("w", 0, (2,), (2,), (0,)), Region("w", 2, (1,), (2,), (2,))],
    ],
)
def test_a_source_tensor_that_is_not_all_there_is_refused(regions: list[Region]) -> None:
    header = '{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    file = {"file": "model.safetensors", "size": 8 + len(header) + 16, "header": header}
    size = sum(region.size for region in regions)
    target = Target("w", (size,), "float32", Replicate(), tuple(regions))
    manifest = SimpleNamespace(source_files=(file,), of_model=(target,), bundles=(), duplicates={})
    with pytest.raises(IntegrityError, match="w: not every element of it is in the model"):
        groups(manifest)  # type: ignore[arg-type]
    whole = replace(target, regions=(Region("w", 1, (2,), (2,), (0,)), Region("w", 0, (2,), (2,), (2,))))
    manifest.of_model = (whole,)
    assert [tensor.name for group in groups(manifest) for tensor in group.sources] == ["w"]  # type: ignore[arg-type]

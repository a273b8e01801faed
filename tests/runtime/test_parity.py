"""The main job: a checkpoint written by transformers, resharded and run under torchrun on gloo, computes what the
single-process model does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import transformers
from places import WORKERS
from single_process import NEW_TOKENS
from torchrun_tools import on_ranks

import reshard

IDS = torch.randint(3, 130, (2, 12), generator=torch.Generator().manual_seed(7)).tolist()
# Sizes that split vocabulary, intermediate size and experts unevenly, and the four ways to tie weights.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in pico.FAMILIES},
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-late-pad": ("llama", {"pad_token_id": 128}),  # its row is on the last rank
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-uneven": ("llama", {"intermediate_size": 50, "vocab_size": 131}),
    **{f"{family}-bf16": (family, {"dtype": torch.bfloat16}) for family in pico.FAMILIES},
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),  # shared by 2 ranks, and by 4
    "qwen2-two-kv-heads": ("qwen2", {"num_key_value_heads": 2}),  # biased, shared by 2 of 4 ranks
    "gemma3-two-kv-heads": ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 8}),
    "mixtral-uneven": ("mixtral", {"intermediate_size": 22}),
}
WORLD_SIZES = (1, 2, 4)


def experts(name: str) -> dict[str, str]:
    """Choose eager experts for uneven sizes, which grouped_mm cannot take even in one process."""
    return {"experts_implementation": "eager"} if name == "mixtral-uneven" else {}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {name: pico.save(family, root / name, **options) for name, (family, options) in VARIANTS.items()}


@pytest.fixture(scope="module")
def singles(sources: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """The results of the single-process models."""
    found = {}
    ids = torch.tensor(IDS)
    for name, folder in sources.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **experts(name))
        with torch.inference_mode():
            logits = model(ids).logits
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        parameters = {parameter: tensor.clone() for parameter, tensor in model.state_dict().items()}
        found[name] = {"logits": logits, "tokens": tokens.tolist(), "parameters": parameters}
        if model.dtype == torch.bfloat16:
            with torch.inference_mode():
                found[name]["exact"] = model.float()(ids).logits
    return found


@pytest.fixture(scope="module", params=WORLD_SIZES)
def sharded(
    request: pytest.FixtureRequest, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[str, Path], dict[str, Any]]:
    """`sharded`: every variant converted for a world size, and run in one torchrun job."""
    world_size = request.param
    root = tmp_path_factory.mktemp(f"tp{world_size}")
    folders = {name: root / name for name in sources}
    for name, source in sources.items():
        reshard.convert(source, folders[name], tp_size=world_size)
    jobs = [{"name": n, "folder": str(f), "ids": IDS, "new_tokens": NEW_TOKENS} for n, f in folders.items()]
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = on_ranks(world_size, str(WORKERS / "parity.py"), str(root / "jobs.json"), str(root / "out.json"))
    assert done.returncode == 0, done.stderr
    results = json.loads((root / "out.json").read_text())
    for name, result in results.items():
        result.update(torch.load(root / f"out.json.{name}.pt"))
    return world_size, folders, results


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_tokens_equal_single_process(name: str, sharded: Any, singles: Any) -> None:
    _, _, results = sharded
    got, expected = results[name], singles[name]
    scale = expected["logits"].abs().max()
    error = ((got["logits"].float() - expected["logits"].float()).abs().max() / scale).item()
    if expected["logits"].dtype == torch.bfloat16:
        # Rounding: at most twice as far as one process is from the same weights computed in fp32.
        exact = expected["exact"]
        ours, theirs = got["logits"].float() - exact, expected["logits"].float() - exact
        assert ours.abs().max() <= 2 * theirs.abs().max()
        assert ours.norm() <= 2 * theirs.norm()
    else:
        assert error <= 1e-5
        assert got["tokens"] == expected["tokens"]


@pytest.mark.parametrize("name", VARIANTS)
def test_full_tensors_equal_the_source(name: str, sharded: Any, singles: Any) -> None:
    _, _, results = sharded
    got, expected = results[name]["parameters"], singles[name]["parameters"]
    assert got.keys() == expected.keys()
    for parameter, tensor in expected.items():
        assert got[parameter].dtype == tensor.dtype
        assert torch.equal(got[parameter], tensor), parameter


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_dtensors(name: str, sharded: Any) -> None:
    """Only packed blocks that do not divide evenly have no DTensor placement."""
    world_size, _, results = sharded
    plain = results[name]["plain"]
    if name == "mixtral-uneven" and world_size == 4:
        assert plain == [f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(2)]
    else:
        assert plain == []


@pytest.mark.skipif(
    importlib.util.find_spec("transformers.distributed.checkpoint") is None,
    reason="this transformers does not read rank files yet",
)
@pytest.mark.parametrize("name", VARIANTS)
def test_opens_in_plain_transformers_where_the_manifest_says_so(name: str, sharded: Any, singles: Any) -> None:
    """If the manifest says so, the folder opens; otherwise transformers refuses it and does not misread it."""
    _, folders, _ = sharded
    expected = singles[name]["logits"]
    if reshard.inspect(folders[name]).runtime_only:
        # Any error of upstream's will do: only a silent load is wrong. Its CheckpointException is a BaseException.
        with pytest.raises(BaseException):  # noqa: B017, PT011
            transformers.AutoModelForCausalLM.from_pretrained(folders[name])
        return
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[name], **experts(name))
    with torch.inference_mode():
        assert torch.equal(model(torch.tensor(IDS)).logits, expected)

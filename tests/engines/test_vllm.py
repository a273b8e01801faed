"""Exports for vLLM, beside vLLM: its own saver, and its engine on a CPU.

`scripts/engine_env vllm` makes the environment that these take.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_report
import engine_tools
import pico
import pytest
import torch
import transformers
from safetensors.torch import load_file

import reshard
from reshard.errors import BadInputError

pytestmark = pytest.mark.skipif(not engine_tools.HERE, reason="no .venv-vllm: scripts/engine_env vllm makes it")

_EXPERTS = {"moe_intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {},
    "deepseek_v3": {
        **_EXPERTS,
        **{"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
        "topk_method": "noaux_tc",
    },
}
HAVE_EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3")
CASES = [*((family, False) for family in FAMILIES), *((family, True) for family in HAVE_EXPERTS)]


def exported(source: Path, out: Path, **options: Any) -> reshard.Manifest:
    return reshard.export(source, out, engine_python=engine_tools.PYTHON, sync=False, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("sources")

    def made(family: str) -> Path:
        folder = root / family
        return folder if folder.exists() else pico.save(family, folder, **FAMILIES[family])

    return made


@pytest.fixture(scope="module")
def saved(source: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What vLLM's own saver writes for all cases, each in a folder of its own."""
    root, jobs = tmp_path_factory.mktemp("saved"), []
    for family, ep in sorted(CASES, key=lambda case: case[0] not in HAVE_EXPERTS):  # the first makes all groups
        out = root / f"{family}-{ep}"
        out.mkdir()
        jobs.append({"folder": str(source(family)), "out": str(out), "ep": ep, "dtype": "float32"})
    engine_tools.save_by_vllm(jobs, 2)
    return root


def same_bytes(ours: Path, theirs: Path) -> None:
    one, other = load_file(ours), load_file(theirs)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize(("family", "ep"), CASES)
def test_bytes_are_those_of_its_own_saver(family: str, ep: bool, source: Any, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = exported(source(family), out, tp_size=2, ep=ep, dtype="float32")
    assert len(manifest.rank_files) == 2
    for record in manifest.rank_files:
        same_bytes(out / record.name, saved / f"{family}-{ep}" / record.name)
    reshard.verify(out, against=source(family))


@pytest.mark.parametrize("form", ["compressed-tensors int4", "AWQ", "GPTQ"])
def test_quantized_tensors_are_plain_ones_here(form: str, tmp_path: Path) -> None:
    source = engine_report.made("llama", form, tmp_path / "source")
    (tmp_path / "saved").mkdir()
    job = {"folder": str(source), "out": str(tmp_path / "saved"), "ep": False, "dtype": "bfloat16"}
    engine_tools.save_by_vllm([job], 2)
    manifest = exported(source, tmp_path / "out", tp_size=2, dtype="bfloat16")
    for record in manifest.rank_files:
        same_bytes(tmp_path / "out" / record.name, tmp_path / "saved" / record.name)
    reshard.verify(tmp_path / "out", against=source)


def test_stages_of_a_pipeline(source: Any, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    job = {"folder": str(source("llama")), "out": str(tmp_path / "saved"), "ep": False, "dtype": "float32"}
    engine_tools.save_by_vllm([job], 2, 2)
    manifest = exported(source("llama"), tmp_path / "out", tp_size=2, pipeline_size=2, dtype="float32")
    assert len(manifest.rank_files) == 4
    for record in manifest.rank_files:
        same_bytes(tmp_path / "out" / record.name, tmp_path / "saved" / record.name)
    reshard.verify(tmp_path / "out", against=source("llama"))


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss"])
def test_a_gpu_gets_the_same_files(family: str, tmp_path: Path) -> None:
    """Planned with vLLM's choices for a GPU, on a machine that has none. gpt_oss can be planned only so."""
    source = pico.save(family, tmp_path / "source", **FAMILIES.get(family, {}))
    options = {"tp_size": 2, "dtype": "bfloat16", "platform": "cuda", "capability": (9, 0), "moe_backend": "triton"}
    gpu = exported(source, tmp_path / "gpu", **options)
    assert gpu.engine is not None
    assert (gpu.engine["platform"], gpu.engine["capability"]) == ("cuda", [9, 0])
    reshard.verify(tmp_path / "gpu", against=source)
    if family != "gpt_oss":
        exported(source, tmp_path / "cpu", tp_size=2, dtype="bfloat16")
        for record in gpu.rank_files:
            assert (tmp_path / "gpu" / record.name).read_bytes() == (tmp_path / "cpu" / record.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_engine_answers_as_transformers_does(family: str, tmp_path: Path) -> None:
    prompts, new_tokens = [[3, 14, 15, 9], [2, 6, 5, 20, 11]], 12
    source = pico.save(family, tmp_path / "source", **engine_tools.RECORDED[f"{family}-tp2"][1])
    exported(source, tmp_path / "out", tp_size=2, dtype="float32")
    said = engine_tools.run_worker(
        "vllm_generate.py",
        *(str(tmp_path / "out"), "2", "sharded_state", "float32", json.dumps(prompts), str(new_tokens)),
    )
    (line,) = [line for line in said.splitlines() if line.startswith("TOKENS ")]
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for prompt, tokens in zip(prompts, json.loads(line.removeprefix("TOKENS ")), strict=True):
        ids = torch.tensor([prompt])
        wanted = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
        )
        assert tokens == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", engine_tools.RECORDED)
def test_the_recorded_plans_are_what_it_still_does(name: str, tmp_path: Path) -> None:
    _, _, options = engine_tools.RECORDED[name]
    exported(engine_tools.checkpoint(name, tmp_path / "source"), tmp_path / "out", dtype="float32", **options)
    assert (tmp_path / "out" / "reshard.copy-plan.gz").read_bytes() == engine_tools.plan_of(name).read_bytes()


def test_what_it_refuses_is_said_in_its_words(source: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"number of attention heads \(8\) must be divisible by .* \(3\)"):
        exported(source("llama"), tmp_path / "out", tp_size=3)
    assert list(tmp_path.iterdir()) == []

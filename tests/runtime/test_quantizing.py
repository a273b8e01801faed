"""Folders that were quantized when they were made: ranks compute what a process does that quantizes at its start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make_pico
import pytest
import torch
import transformers
from cli_tools import Checkpoint
from places import WORKERS
from torchrun_tools import on_ranks
from transformers import BitsAndBytesConfig

import reshard
from reshard.operations.reference import fixed_ids, quality, single_model, values_of
from runtime.checking.check import Parity, Quality
from runtime.checking.text import parity_text

BEGINNING = "Once upon a time"
NEW_TOKENS = 12
KERNELS = ["math", "flash"]  # of attention on a CPU
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192}  # of whole blocks, as bitsandbytes needs on a CPU


def quantizing() -> Any:
    """What the usual example loads a model with."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16)


OPTIONS: dict[str, Any] = {"quantize": "nf4", "quantize_config": {"bnb_4bit_compute_dtype": "float16"}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows a text, so that no rounding in fp16 changes its words."""
    folder = tmp_path_factory.mktemp("trained") / "source"
    with pytest.MonkeyPatch.context() as patch:
        config = make_pico.LlamaConfig
        patch.setattr(make_pico, "STEPS", 60)
        patch.setattr(make_pico, "LlamaConfig", lambda **options: config(**{**options, **SHAPE}))
        make_pico.main(str(folder))
    return folder


@pytest.fixture(scope="module")
def nf4(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nf4") / "out"
    reshard.convert(trained, out, tp_size=2, dtype="float16", **OPTIONS)
    return out


@pytest.fixture(scope="module")
def told(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `check` finds on 2 ranks: with the source, and with the stored logits."""
    root, source = tmp_path_factory.mktemp("quantizing"), checkpoint("llama", **SHAPE)
    reshard.convert(source, root / "out", tp_size=2, reference_logits=True, **OPTIONS)
    words = [str(root / "out"), str(source), str(root / "told.json")]
    done = on_ranks(2, str(WORKERS / "quantizing.py"), *words)
    assert done.returncode == 0, done.stderr
    return json.loads((root / "told.json").read_text())


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_words_are_those_of_a_process_that_quantizes_at_its_start(kernel: str, trained: Path, nf4: Path) -> None:
    single = transformers.AutoModelForCausalLM.from_pretrained(
        trained, dtype="float16", quantization_config=quantizing()
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    inputs = tokenizer(BEGINNING, return_tensors="pt")
    tokens = single.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, inputs.input_ids.shape[1] :]
    asked = ["--prompt", BEGINNING, "--max-new-tokens", str(NEW_TOKENS), "--sdpa", kernel, "--format", "json"]
    done = on_ranks(2, "-m", "runtime", "generate", str(nf4), *asked)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"] == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("against", ["source", "stored"])
def test_check_compares_with_the_quantized_process_and_says_what_quantizing_cost(
    against: str, told: dict[str, Any], checkpoint: Checkpoint
) -> None:
    found = told[against]
    assert found["ok"], found
    assert found["difference"] is None
    assert told["native"]["ok"], told["native"]  # in fp16, as the checkpoint says
    assert 1e-5 < told["native"]["tolerance"] < 0.1
    plain = single_model(checkpoint("llama", **SHAPE), torch.float32)
    single = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint("llama", **SHAPE), quantization_config=quantizing()
    ).dequantize()  # bitsandbytes' own product rounds the scales on some CPUs
    kept = slice(None) if against == "source" else slice(-4, None)
    before, after = (values_of(model, fixed_ids(plain))[:, kept] for model in (plain, single))
    divergence, most, same = quality(before, after)
    assert 0 < divergence < most
    assert found["quality"] == {
        "divergence": pytest.approx(divergence, rel=1e-4),
        "largest_divergence": pytest.approx(most, rel=1e-4),
        "same_token": same,
    }


def test_quality_is_of_probabilities() -> None:
    """By hand: two positions, of which the second has another most probable token."""
    before = torch.tensor([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]]).log()
    after = torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]]).log() + 3
    divergence, largest, same = quality(before, after)
    expected = 0.5 * torch.tensor(2.0).log().item() - 0.25 * torch.tensor(2.0).log().item()
    assert (divergence, largest, same) == (pytest.approx(expected / 2), pytest.approx(expected), 0.5)
    text = parity_text("out", Parity(0.0, 0.0, 1e-5, True, quality=Quality(divergence, largest, same)), per_layer=False)
    assert text.endswith("the most probable token stays the same at 50% of positions")

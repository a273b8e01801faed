"""Checkpoints as they come: ties in every form, unused tensors, mixed dtypes, casts. In process, at one rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from single_process import logits, rewrite, single

import reshard
import runtime


def assert_same_model(source: Path, out: Path) -> reshard.Manifest:
    manifest = reshard.convert(source, out, tp_size=1)
    reshard.verify(out, against=source)
    expected = transformers.AutoModelForCausalLM.from_pretrained(source)
    loaded = runtime.load(out)
    assert torch.equal(logits(loaded), logits(expected))
    for (name, one), (other, two) in zip(loaded.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == other
        assert one.dtype == two.dtype, name
    return manifest


def test_tied_with_only_the_owner(tmp_path: Path) -> None:
    source = single("llama", tmp_path / "source", tie_word_embeddings=True)
    manifest = assert_same_model(source, tmp_path / "out")
    assert manifest.tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_tied_with_only_the_tied_name(tmp_path: Path) -> None:
    """transformers ties to the name that exists."""
    source = single("llama", tmp_path / "source", tie_word_embeddings=True)
    rewrite(source, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    manifest = assert_same_model(source, tmp_path / "out")
    assert manifest.tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_tied_with_both_and_equal(tmp_path: Path) -> None:
    """The tensor is stored once, and the manifest remembers the other name."""
    source = single("llama", tmp_path / "source", tie_word_embeddings=True)
    rewrite(source, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    manifest = assert_same_model(source, tmp_path / "out")
    assert manifest.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert manifest.duplicates == {"lm_head.weight": "model.embed_tokens.weight"}


def test_tied_with_both_and_different_stays_apart(tmp_path: Path) -> None:
    source = single("llama", tmp_path / "source", tie_word_embeddings=True)
    rewrite(source, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    manifest = assert_same_model(source, tmp_path / "out")
    assert manifest.tied == {}
    assert "different values" in manifest.runtime_only[0]


def test_unused_tensors_are_kept_apart_or_dropped(tmp_path: Path) -> None:
    source = single("llama", tmp_path / "source")
    extra = torch.arange(7, dtype=torch.int16)
    rewrite(source, lambda tensors: tensors.update({"model.layers.9.extra": extra}))
    assert_same_model(source, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "unused.safetensors")["model.layers.9.extra"], extra)
    manifest = reshard.convert(source, tmp_path / "dropped", tp_size=1, drop_unused=True)
    assert manifest.dropped == ("model.layers.9.extra",)
    assert not (tmp_path / "dropped" / "unused.safetensors").exists()
    reshard.verify(tmp_path / "dropped", against=source)


def test_a_stray_dtype_is_stored_as_it_is_and_computed_as_the_model_does(tmp_path: Path) -> None:
    source = single("llama", tmp_path / "source", dtype=torch.bfloat16)
    rewrite(source, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}))
    manifest = assert_same_model(source, tmp_path / "out")
    norm = next(p for p in manifest.parameters if p.name == "model.norm.weight")
    assert (norm.dtype, norm.compute_dtype) == ("float32", "bfloat16")


def test_config_without_dtype_takes_the_tensors(tmp_path: Path) -> None:
    source = single("llama", tmp_path / "source", dtype=torch.float16)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    assert assert_same_model(source, tmp_path / "out").dtype == "float16"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cast_equals_torch(tmp_path: Path, dtype: str) -> None:
    source = single("mixtral", tmp_path / "source")
    reshard.convert(source, tmp_path / "out", tp_size=1, dtype=dtype)
    expected = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).state_dict()
    stored = load_file(tmp_path / "out" / "shard-00001-model-00001-of-00001.safetensors")
    assert stored.keys() == expected.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor, expected[name]), name


def test_parameters_that_stay_in_fp32_are_not_cast(tmp_path: Path) -> None:
    """transformers keeps some parameters in fp32 under any dtype, from 5.24 on also the router's weight; so do the
    rank files."""
    source = single("glm4_moe", tmp_path / "source")
    reshard.convert(source, tmp_path / "out", tp_size=1, dtype="bfloat16")
    stored = load_file(tmp_path / "out" / "shard-00001-model-00001-of-00001.safetensors")
    expected = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).state_dict()
    for name, tensor in stored.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.dtype == expected[name].dtype, name
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_renamed_tensors(tmp_path: Path) -> None:
    """Old gpt_neox checkpoints name their head `embed_out`; transformers renames it."""
    source = single("gpt_neox", tmp_path / "source")
    names = set(load_file(source / "model.safetensors"))
    manifest = assert_same_model(source, tmp_path / "out")
    assert {p.name for p in manifest.parameters} != names

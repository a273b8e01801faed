"""Conversions new in transformers 5.24, on checkpoints as they are published."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from merge_tools import both_ways, digests
from safetensors.torch import load_file, save_file

import reshard

pytestmark = pytest.mark.skipif("dory" not in families.MODEL_TYPES, reason="not in this transformers")
RANK_FILE = "shard-00001-model-00001-of-00001.safetensors"


def assert_as_transformers(source: Path, out: Path, *, dtype: str | None = None) -> Any:
    """Check that the folder holds what `from_pretrained` makes of the source."""
    manifest = reshard.convert(source, out, tp_size=1, dtype=dtype)
    reshard.verify(out, against=source)
    wanted = getattr(torch, dtype) if dtype else "auto"
    expected = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=wanted).state_dict()
    stored = load_file(out / RANK_FILE)
    assert stored.keys() | manifest.tied.keys() == expected.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor.to(expected[name].dtype), expected[name]), name
    return manifest


def padded(folder: Path, dtype: torch.dtype) -> Path:
    """Save a model whose unembedding has ten rows more than the vocabulary, as checkpoints of this family do."""
    config = families.small_config("inkling2_text")
    config.vocab_size, config.unpadded_vocab_size, config.dtype = 140, 130, dtype
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    (head,) = [name for name in tensors if "unembed" in name or name == "lm_head.weight"]
    assert tensors[head].shape[0] == 140
    tensors[head][130:] = torch.randn(10, tensors[head].shape[1]).to(dtype)  # these rows come back whatever they hold
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_rows_are_not_in_the_model_and_are_given_back(dtype: torch.dtype, tmp_path: Path) -> None:
    source = padded(tmp_path / "source", dtype)
    manifest = assert_as_transformers(source, tmp_path / "out")
    head = next(target for target in manifest.parameters if target.name == "lm_head.weight")
    assert head.shape[0] == 130
    assert manifest.unused_file is not None
    assert any("1 tensors are used in part" in note for note in reshard.plan(source, tp_size=2).notes)
    for drop in (False, True):
        reshard.convert(source, tmp_path / f"two {drop}", tp_size=2, drop_unused=drop)
        reshard.verify(tmp_path / f"two {drop}", against=source)
        reshard.merge(tmp_path / f"two {drop}", tmp_path / f"again {drop}")
        assert digests(tmp_path / f"again {drop}") == digests(source)
    both_ways(source, tmp_path, {"tp_size": 2}, {"tp_size": 4})


def test_a_cast_within_a_conversion(tmp_path: Path) -> None:
    """transformers casts the head to the model's dtype while removing the padding."""
    source = padded(tmp_path / "source", torch.bfloat16)
    assert_as_transformers(source, tmp_path / "wide", dtype="float32")
    source = padded(tmp_path / "wide-source", torch.float32)
    assert_as_transformers(source, tmp_path / "narrow", dtype="bfloat16")


def test_two_blocks_that_are_one_layer(tmp_path: Path) -> None:
    """Dory's checkpoints number attention and MLP as layers of their own."""
    model = transformers.AutoModelForCausalLM.from_config(families.small_config("dory"))
    model.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"

    def published(name: str) -> str:
        def block(match: re.Match[str]) -> str:
            number, rest = 2 * int(match[1]), match[2]
            if rest in ("lambda_1", "lambda_2"):
                return f"layers.{number + (rest == 'lambda_2')}.{'attn' if rest == 'lambda_1' else 'mlp'}_alpha"
            return f"layers.{number + (rest == 'mlp')}.mixer"

        return re.sub(r"layers\.(\d+)\.(self_attn|mlp|lambda_[12])", block, name)

    tensors = {published(name): tensor for name, tensor in load_file(path).items()}
    assert any("mixer" in name for name in tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    assert_as_transformers(tmp_path / "source", tmp_path / "out")
    reshard.convert(tmp_path / "out", tmp_path / "two", tp_size=2)
    reshard.merge(tmp_path / "two", tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tmp_path / "source")

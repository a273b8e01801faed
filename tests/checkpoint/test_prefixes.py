"""Tensor names with a prefix that wrappers left on all of them and that is no part of the model's names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from cli_tools import INDEX, Checkpoint, Cli, Refused
from merge_tools import digests
from safetensors.torch import load_file, save_file
from single_process import IDS, logits, rewrite, single

import reshard
import runtime
from reshard.checkpoint.naming import shared_prefix
from reshard.operations.reference import single_model

PREFIXES = ["module.", "_orig_mod.", "base_model.model.", "module.module.", "_orig_mod.module.", "student."]


def rename(source: Path, names: dict[str, str]) -> Path:
    """Write a checkpoint of several files with its tensors under other names."""
    index = json.loads((source / INDEX).read_text())
    for path in source.glob("*.safetensors"):
        tensors = {names[name]: tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    index["weight_map"] = {names[name]: file for name, file in index["weight_map"].items()}
    (source / INDEX).write_text(json.dumps(index))
    return source


def names_of(source: Path) -> list[str]:
    return list(json.loads((source / INDEX).read_text())["weight_map"])


def prefixed(source: Path, prefix: str) -> Path:
    return rename(source, {name: prefix + name for name in names_of(source)})


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_prefix_of_all_names(family: str, prefix: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The prefix is dropped to find the parameters, and merge restores the source's names."""
    plain = checkpoint(family)
    source = prefixed(Path(shutil.copytree(plain, tmp_path / "source")), prefix)
    said: list[str] = []
    manifest = reshard.convert(source, tmp_path / "out", tp_size=1, say=said.append)
    assert any(f"begin with {prefix.split('.')[0]}." in line for line in said)
    assert all(region.source.startswith(prefix) for target in manifest.parameters for region in target.regions)
    expected = transformers.AutoModelForCausalLM.from_pretrained(plain)
    assert torch.equal(logits(runtime.load(tmp_path / "out")), logits(expected))
    reshard.verify(tmp_path / "out", against=source)
    reshard.convert(tmp_path / "out", tmp_path / "wider", tp_size=2)
    reshard.verify(tmp_path / "wider", against=source)
    reshard.merge(tmp_path / "wider", tmp_path / "again")
    assert digests(tmp_path / "again") == digests(source)


def test_the_single_process_model_has_the_same_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """transformers alone would leave all weights at their random values."""
    source = prefixed(Path(shutil.copytree(checkpoint("llama"), tmp_path / "source")), "_orig_mod.")
    expected = logits(transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama")))
    with torch.inference_mode():
        assert torch.equal(single_model(source, torch.float32)(IDS).logits, expected)


def test_a_prefix_of_some_names_stays(source: Path, refused: Refused) -> None:
    first, *others = names_of(source)
    rename(source, {first: first, **{name: f"module.{name}" for name in others}})
    refused(3, ["plan", source, "--tp-size", 2], "lacks", hint="begin with module.")


def test_two_names_for_one_parameter_are_refused(tmp_path: Path, refused: Refused) -> None:
    """transformers takes `norm.weight` for `model.norm.weight`."""
    source = single("llama", tmp_path / "source")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"module.{name}"] = tensors.pop(name)
        tensors["module.norm.weight"] = tensors["module.model.norm.weight"].clone()

    rewrite(source, change)
    refused(3, ["plan", source, "--tp-size", 2], "second source tensor", "model.norm.weight")


def test_the_words_that_are_no_part_of_the_names() -> None:
    known = {"model.norm", "lm_head"}.__contains__
    assert shared_prefix(["model.norm", "a.b"], known) == ""
    assert shared_prefix(["a.model.norm", "a.lm_head"], known) == "a."
    assert shared_prefix(["a.b.model.norm", "a.b.lm_head"], known) == "a.b."
    assert shared_prefix(["a.model.norm", "b.lm_head"], known) == ""
    assert shared_prefix(["a.x", "a.y"], known) == ""
    assert shared_prefix([], known) == ""
    assert shared_prefix(["ab.model.norm", "ac.lm_head"], known) == ""


def test_it_is_told(checkpoint: Checkpoint, tmp_path: Path, cli: Cli) -> None:
    source = prefixed(Path(shutil.copytree(checkpoint("llama"), tmp_path / "source")), "_orig_mod.")
    assert "begin with _orig_mod.: taken off" in cli("plan", source, "--tp-size", 2).out
    assert "_orig_mod." in json.loads(cli("plan", source, "--tp-size", 2, "--format", "json").out)["notes"][0]
    assert "_orig_mod." in cli("convert", source, tmp_path / "out", "--tp-size", 2, "--no-sync", aloud=True).err


# --- tensors without elements ---


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_zero_3_leaves(family: str, tmp_path: Path, refused: Refused) -> None:
    source = single(family, tmp_path / "source")
    rewrite(source, lambda t: t.update({name: torch.zeros(0) for name in t if "layers" in name}))
    refused(3, ["plan", source, "--tp-size", 2], "empty", "ZeRO-3", "model.layers.0.", hint="zero_to_fp32.py")

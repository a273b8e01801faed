"""The transformers class of a checkpoint: the one in `architectures` if it belongs to the `model_type`, else the one
that the auto classes take."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli_tools import Checkpoint, Cli, Refused, configure
from single_process import IDS, logits

import reshard
import runtime
from reshard.checkpoint.architecture import model_class
from reshard.operations.reference import single_model

LEFT = {  # names that wrappers, forks and mergers leave behind
    "FSDPLlamaForCausalLM": "LlamaForCausalLM",
    "LLaMAForCausalLM": "LlamaForCausalLM",
    "PeftModelForCausalLM": "LlamaForCausalLM",
    "OptimizedModule": "LlamaForCausalLM",
    "PreTrainedModel": "LlamaForCausalLM",  # abstract
    "MistralForCausalLM": "LlamaForCausalLM",  # of another model type
    "Qwen2ForCausalLM": "LlamaForCausalLM",
    "no identifier": "LlamaForCausalLM",
    "FSDPLlamaForSequenceClassification": "LlamaForSequenceClassification",
    "MistralForTokenClassification": "LlamaForTokenClassification",
}


def write_config(folder: Path, model_type: str, **options: Any) -> Path:
    folder.mkdir()
    transformers.AutoConfig.for_model(model_type).save_pretrained(folder)
    configure(folder, **options)
    return folder


@pytest.mark.parametrize("name", LEFT)
def test_the_class_of_the_model_type_is_taken(name: str, tmp_path: Path) -> None:
    taken, config = model_class(write_config(tmp_path / "source", "llama", architectures=[name]))
    assert taken.__name__ == LEFT[name]
    assert type(config).__name__ == "LlamaConfig"


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaModel"])
def test_a_class_of_the_model_type_is_taken_as_it_is_named(name: str, tmp_path: Path) -> None:
    source = write_config(tmp_path / "source", "llama", architectures=["Unknown", name])
    assert model_class(source)[0].__name__ == name


@pytest.mark.parametrize("names", [["PeftModelForSeq2SeqLM"], ["OptimizedModule"], []])
def test_an_encoder_decoder(names: list[str], tmp_path: Path) -> None:
    source = write_config(tmp_path / "source", "t5", architectures=names)
    assert model_class(source)[0] is transformers.T5ForConditionalGeneration


def test_a_class_of_a_part_of_the_configuration(tmp_path: Path) -> None:
    """The text model of an image model is made of its part of the configuration, as in `AutoModelForCausalLM`."""
    source = write_config(tmp_path / "source", "llama4", architectures=["Llama4ForCausalLM"])
    taken, config = model_class(source)
    assert taken is transformers.Llama4ForCausalLM
    assert type(config) is transformers.Llama4TextConfig


def test_what_has_no_language_model_is_refused(source: Path, refused: Refused) -> None:
    transformers.AutoConfig.for_model("vit").save_pretrained(source)
    configure(source, architectures=["FSDPViT"])
    refused(8, ["plan", source, "--tp-size", 2], "FSDPViT", "vit", hint="architectures")


@pytest.mark.parametrize("name", ["FSDPLlamaForCausalLM", "MistralForCausalLM"])
def test_it_is_told_and_computes_what_the_auto_class_does(
    name: str, checkpoint: Checkpoint, out: Path, cli: Cli
) -> None:
    source = Path(shutil.copytree(checkpoint("llama", num_key_value_heads=8), out.parent / "source"))
    configure(source, architectures=[name])
    told = (name, "LlamaForCausalLM is taken")
    planned = cli("plan", source, "--tp-size", 2)
    assert all(word in planned.out for word in told), planned
    notes = json.loads(cli("plan", source, "--tp-size", 2, "--format", "json").out)["notes"]
    assert len(notes) == 1
    assert all(word in notes[0] for word in told)
    converted = cli("convert", source, out, "--tp-size", 1, "--no-sync", aloud=True)
    assert converted.code == 0
    assert all(word in converted.err for word in told), converted
    expected = logits(transformers.AutoModelForCausalLM.from_pretrained(source))
    assert torch.equal(logits(runtime.load(out)), expected)
    with torch.inference_mode():
        assert torch.equal(single_model(source, torch.float32)(IDS).logits, expected)


def test_nothing_is_told_of_a_class_that_is_named(checkpoint: Checkpoint) -> None:
    assert reshard.plan(checkpoint("llama"), tp_size=2).notes == ()

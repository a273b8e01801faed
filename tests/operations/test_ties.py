"""Tied parameters in groups: each gets the value that transformers gives it, whichever of them the checkpoint has."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import transformers
from cli_tools import Refused
from merge_tools import digests
from safetensors.torch import load_file, save_file

import reshard
import runtime

GROUP = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
RULES = {"decoder.block.*.layer.*.DenseReluDense.wi": "colwise", "decoder.block.*.layer.*.DenseReluDense.wo": "rowwise"}


def t5(folder: Path, values: dict[str, int], *, tied: bool = True) -> Path:
    """Save a T5 with only the members of `GROUP` in `values`; equal numbers mean equal tensors."""
    sizes = {"vocab_size": 130, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    torch.manual_seed(0)
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=tied)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if k not in GROUP}
    for name, number in values.items():
        tensors[name] = torch.randn(130, 32, generator=torch.Generator().manual_seed(number))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_as_transformers(source: Path, out: Path) -> reshard.Manifest:
    """Check that every parameter is the one of `from_pretrained`."""
    manifest = reshard.convert(source, out, tp_size=1, tp_plan=RULES)
    reshard.verify(out, against=source)
    expected, loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(source), runtime.load(out)
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(runtime.full_tensor(loaded, name), value), name
    return manifest


@pytest.mark.parametrize("stored", [s for n in (1, 2, 3, 4) for s in itertools.combinations(GROUP, n)], ids="+".join)
def test_any_of_them_serves(stored: tuple[str, ...], tmp_path: Path) -> None:
    """All stored members are equal, so one is kept; the source's names come back."""
    source = t5(tmp_path / "source", dict.fromkeys(stored, 1))
    manifest = assert_as_transformers(source, tmp_path / "out")
    assert set(manifest.tied) == set(GROUP) - {"shared.weight"}
    assert set(manifest.tied.values()) == {"shared.weight"}
    assert len(manifest.duplicates) == len(stored) - 1
    reshard.convert(tmp_path / "out", tmp_path / "two", tp_size=2, tp_plan=RULES)
    reshard.merge(tmp_path / "two", tmp_path / "again")
    assert digests(tmp_path / "again") == digests(source)


DIFFERING = {
    "the head": {"shared.weight": 1, "lm_head.weight": 2},
    "the owner is not there": {"decoder.embed_tokens.weight": 1, "lm_head.weight": 2},
    "each": {name: number for number, name in enumerate(GROUP)},
    "two and two": {name: number // 2 for number, name in enumerate(GROUP)},
}


@pytest.mark.parametrize("values", DIFFERING.values(), ids=DIFFERING)
def test_stored_ones_that_differ_stay_apart(values: dict[str, int], tmp_path: Path) -> None:
    source = t5(tmp_path / "source", values)
    manifest = assert_as_transformers(source, tmp_path / "out")
    assert "different values" in " ".join(manifest.runtime_only)
    reshard.merge(tmp_path / "out", tmp_path / "again")
    assert digests(tmp_path / "again") == digests(source)


@pytest.mark.parametrize("member", GROUP[:3])
def test_a_head_of_its_own(member: str, tmp_path: Path) -> None:
    """madlad400 stores the decoder's embedding and a head, and says that nothing is tied; 5.17 ties them anyway."""
    source = t5(tmp_path / "source", {member: 1, "lm_head.weight": 2}, tied=False)
    assert_as_transformers(source, tmp_path / "out")


def test_a_group_of_which_nothing_is_there(tmp_path: Path, refused: Refused) -> None:
    source = t5(tmp_path / "source", {})
    plan = tmp_path / "plan.toml"
    plan.write_text("\n".join(f'"{pattern}" = "{style}"' for pattern, style in RULES.items()))
    refused(3, ["plan", source, "--tp-size", 2, "--plan", plan], "lacks 1 ", "shared.weight")

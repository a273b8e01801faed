"""Experts of several dtypes in one parameter: stored in a dtype that holds them all, or in the dtype asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli_tools import Cli, Refused
from merge_tools import both_ways, digests
from safetensors.torch import load_file
from single_process import logits, rewrite, single
from torchrun_tools import on_ranks

import reshard
import runtime
from reshard.errors import IntegrityError
from reshard.files.dtypes import FLOATING, holds, widest

RANK_FILE = "shard-00001-model-00001-of-00001.safetensors"


def mixed(folder: Path, *, dtype: torch.dtype = torch.bfloat16, other: torch.dtype = torch.float32) -> Path:
    """Save a Mixtral in `dtype` whose second expert of each layer is in `other`, with values finer than `dtype`'s."""
    source = single("mixtral", folder, dtype=dtype)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts.1." in name]:
            tensors[name] = (tensors[name].float() * 1.01).to(other)

    return rewrite(source, change)


KINDS = {
    "float32 in bfloat16": (torch.bfloat16, torch.float32, "float32"),
    "bfloat16 in float32": (torch.float32, torch.bfloat16, "float32"),
    "float16 in bfloat16": (torch.bfloat16, torch.float16, "float32"),
    "float64 in float16": (torch.float16, torch.float64, "float64"),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, str]:
    """A checkpoint, its model's dtype, and the dtype that holds all its experts."""
    dtype, other, stored = KINDS[request.param]
    source = mixed(tmp_path / "source", dtype=dtype, other=other)
    return source, str(dtype).removeprefix("torch."), stored


def experts(manifest: Any) -> list[Any]:
    return [target for target in manifest.parameters if "experts" in target.name]


def test_no_bit_is_lost(kind: tuple[Path, str, str], tmp_path: Path) -> None:
    """Each expert has its source values in the rank file; the model computes as transformers' does."""
    source, dtype, stored = kind
    manifest = reshard.convert(source, tmp_path / "out", tp_size=1)
    assert {target.dtype for target in experts(manifest)} == {stored}
    assert {target.compute_dtype for target in experts(manifest)} == {None if dtype == stored else dtype}
    tensors, held = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / RANK_FILE)
    for number in range(4):
        down = tensors[f"model.layers.0.block_sparse_moe.experts.{number}.w2.weight"]
        assert torch.equal(held["model.layers.0.mlp.experts.down_proj"][number], down.to(getattr(torch, stored)))
    reshard.verify(tmp_path / "out", against=source)
    expected = transformers.AutoModelForCausalLM.from_pretrained(source)
    loaded = runtime.load(tmp_path / "out")
    for name, value in expected.state_dict().items():
        assert torch.equal(runtime.full_tensor(loaded, name), value), name
    assert torch.equal(logits(loaded), logits(expected))


@pytest.mark.parametrize("layout", ["source", "hf"])
def test_merge_gives_each_its_dtype_back(kind: tuple[Path, str, str], layout: str, tmp_path: Path) -> None:
    source = kind[0]
    reshard.convert(source, tmp_path / "out", tp_size=2)
    reshard.merge(tmp_path / "out", tmp_path / "again", layout=layout)
    if layout == "source":
        assert digests(tmp_path / "again") == digests(source)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype, name
        assert torch.equal(after[name], value), name


def test_other_numbers_of_ranks(kind: tuple[Path, str, str], tmp_path: Path) -> None:
    source = kind[0]
    both_ways(source, tmp_path, {"tp_size": 2}, {"tp_size": 4})
    both_ways(source, tmp_path, {"tp_size": 4, "ep_size": 2}, {"tp_size": 1})
    both_ways(source, tmp_path, {"tp_size": 2}, {"tp_size": 4, "dtype": "bfloat16"})
    both_ways(source, tmp_path, {"tp_size": 2}, {"tp_size": 4, "dtype": "float16"})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_dtype_that_is_asked_for(dtype: str, tmp_path: Path) -> None:
    source = mixed(tmp_path / "source")
    manifest = reshard.convert(source, tmp_path / "out", tp_size=2, dtype=dtype)
    assert {target.dtype for target in experts(manifest)} == {dtype}
    reshard.verify(tmp_path / "out", against=source)
    reshard.convert(tmp_path / "out", tmp_path / "one", tp_size=1, dtype=dtype)
    expected = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).state_dict()
    for name, tensor in load_file(tmp_path / "one" / RANK_FILE).items():
        assert torch.equal(tensor, expected[name]), name


def test_what_a_cast_has_lost_is_refused(tmp_path: Path, refused: Refused) -> None:
    source = mixed(tmp_path / "source")
    reshard.convert(source, tmp_path / "out", tp_size=2, dtype="bfloat16")
    refused(3, ["merge", tmp_path / "out", tmp_path / "again"], "were cast", ".experts.1.", hint="--layout hf")
    out = ["convert", tmp_path / "out", tmp_path / "wider", "--tp-size", 4]
    refused(3, out, "cast from float32 to bfloat16", hint="--dtype bfloat16")


def test_a_wider_dtype_loses_nothing(tmp_path: Path) -> None:
    """A whole checkpoint that was widened comes back byte for byte, not its experts alone."""
    source = single("llama", tmp_path / "source", dtype=torch.bfloat16)
    reshard.convert(source, tmp_path / "out", tp_size=2, dtype="float32")
    reshard.merge(tmp_path / "out", tmp_path / "again")
    assert digests(tmp_path / "again") == digests(source)
    both_ways(source, tmp_path, {"tp_size": 2, "dtype": "float32"}, {"tp_size": 4})


def test_bits_of_a_nan_that_a_wider_dtype_does_not_keep_are_noticed(tmp_path: Path) -> None:
    source = mixed(tmp_path / "source")
    name = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    rewrite(source, lambda tensors: tensors[name].view(torch.int16)[0, :2].fill_(0x7FE1))
    reshard.convert(source, tmp_path / "out", tp_size=2)
    reshard.verify(tmp_path / "out", against=source)
    with pytest.raises(IntegrityError, match="as it went in") as caught:
        reshard.merge(tmp_path / "out", tmp_path / "again")
    assert "--layout hf" in (caught.value.hint or "")
    reshard.merge(tmp_path / "out", tmp_path / "values", layout="hf")
    value = load_file(tmp_path / "values" / "model.safetensors")[name]
    assert torch.equal(value.isnan(), load_file(source / "model.safetensors")[name].isnan())


def test_it_is_told(tmp_path: Path, cli: Cli) -> None:
    source = mixed(tmp_path / "source")
    words = ("4 parameters", "(bfloat16, float32), stored in float32", "model.layers.0.mlp.experts.gate_up_proj")
    planned = cli("plan", source, "--tp-size", 2).out
    assert all(word in planned for word in words)
    notes = json.loads(cli("plan", source, "--tp-size", 2, "--dtype", "bfloat16", "--format", "json").out)["notes"]
    assert "stored in bfloat16" in notes[0]
    converted = cli("convert", source, tmp_path / "out", "--tp-size", 2, "--no-sync", aloud=True).err
    assert all(word in converted for word in words)


def test_integers_among_floats_are_refused(tmp_path: Path, refused: Refused) -> None:
    source = mixed(tmp_path / "source", other=torch.int8)
    refused(3, ["plan", source, "--tp-size", 2], "bfloat16 and int8")


def test_dtypes_that_hold_others() -> None:
    """Every pair of dtypes agrees with torch's `promote_types`."""
    for one in FLOATING:
        for other in FLOATING:
            promoted = torch.promote_types(getattr(torch, one), getattr(torch, other))
            assert widest((one, other)) == str(promoted).removeprefix("torch.")
            assert holds(one, other) == (promoted == getattr(torch, one))
    assert widest(["int8"]) == "int8"
    assert widest(["int8", "bfloat16"]) is None
    assert widest(["int8", "int16"]) is None


SAVE = """
import sys, runtime
model = runtime.load(sys.argv[1])
model.save_pretrained(sys.argv[2])
"""


def test_a_loaded_model_is_saved_in_the_dtypes_of_the_source(tmp_path: Path) -> None:
    source = mixed(tmp_path / "source", dtype=torch.float32, other=torch.bfloat16)  # loads without loss
    reshard.convert(source, tmp_path / "out", tp_size=2)
    (tmp_path / "save.py").write_text(SAVE)
    done = on_ranks(2, str(tmp_path / "save.py"), str(tmp_path / "out"), str(tmp_path / "saved"))
    assert done.returncode == 0, done.stderr
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype, name
        assert torch.equal(after[name], value), name


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_floats_of_8_bits_are_no_model_s_own(stored: torch.dtype, tmp_path: Path, cli: Cli, refused: Refused) -> None:
    """A model without quantization computes 8-bit weights in its own dtype; `--dtype` casts them too."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: tensor.to(stored) for name, tensor in tensors.items()}

    source = rewrite(single("llama", tmp_path / "source"), change)
    out, cast, back = tmp_path / "out", tmp_path / "cast", tmp_path / "back"
    manifest = reshard.convert(source, out, tp_size=1)
    kinds = {(target.dtype, target.compute_dtype) for target in manifest.parameters}
    assert kinds == {(str(stored).removeprefix("torch."), "float32")}
    expected = transformers.AutoModelForCausalLM.from_pretrained(source)
    loaded = runtime.load(out)
    for name, value in expected.state_dict().items():
        assert torch.equal(runtime.full_tensor(loaded, name), value), name
    assert torch.equal(logits(loaded), logits(expected))
    reshard.merge(out, back)
    assert digests(back) == digests(source)

    assert cli("convert", source, cast, "-tp", 1, "--dtype", "bf16").code == 0
    assert {tensor.dtype for tensor in load_file(cast / RANK_FILE).values()} == {torch.bfloat16}
    assert cli("verify", cast, "--against", source).code == 0
    refused(3, ["merge", cast, tmp_path / "no"], "were cast to another dtype")

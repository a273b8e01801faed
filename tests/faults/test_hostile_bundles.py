"""Quantized checkpoints that lie: one clear line that names the tensor, before any data is read, nothing large made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import Checkpoint, configure
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantizing import KINDS, Tensors, quantize_folder
from safetensors.torch import load_file, save_file

import reshard
from reshard.errors import BadInputError, IntegrityError, VersionError

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def quantized(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("hostile")

    def made(kind: str) -> Path:
        out = root / kind
        plain = checkpoint("llama", hidden_size=64, intermediate_size=96, max_shard_size="1GB")
        return out if out.exists() else quantize_folder(plain, out, kind)

    return made


@pytest.fixture
def spoiled(quantized: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a quantized checkpoint in which tensors, or the configuration of its quantization, were changed."""

    def spoil(kind: str, change: Callable[[Tensors], object] = lambda _: None, **told: Any) -> Path:
        folder = Path(shutil.copytree(quantized(kind), tmp_path / "source"))
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            if f"{Q}.{next(iter(KINDS[kind][0](torch.ones(16, 64)))).lstrip('.')}" in tensors:
                change(tensors)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        index = folder / "model.safetensors.index.json"
        if index.exists():
            places = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
            index.write_text(json.dumps({"weight_map": places}))
        if told:
            configure(folder, quantization_config={**KINDS[kind][1], **told})
        return folder

    return spoil


TENSORS: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "no scales": ("fp8", lambda t: t.pop(f"{Q}.weight_scale_inv"), rf"{Q}\.weight_scale_inv is missing"),
    "no shape": ("ct_w4", lambda t: t.pop(f"{Q}.weight_shape"), rf"{Q}\.weight_shape is missing"),
    "no zero points": ("ct_w4_zero", lambda t: t.pop(f"{Q}.weight_zero_point"), "weight_zero_point is missing"),
    "no groups": ("gptq_order", lambda t: t.pop(f"{Q}.g_idx"), rf"{Q}\.g_idx is missing"),
    "no state": ("nf4", lambda t: t.pop(f"{Q}.weight.quant_state.bitsandbytes__nf4"), "quant_state.* is missing"),
    "no nested scales": ("nf4_nested", lambda t: t.pop(f"{Q}.weight.nested_absmax"), "nested_absmax is missing"),
    "no numbers": ("int8", lambda t: t.pop(f"{Q}.weight"), rf"{Q}\.weight is missing"),
    "scales of another grid": (
        "fp8",
        lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(3, 4)}),
        r"weight_scale_inv is \[3, 4\], and not \[4, 4\]",
    ),
    "scales of the other order": (
        "gptq",
        lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:4]}),
        r"scales is \[4, 64\], and not \[8, 64\]",
    ),
    "scales of another dtype": (
        "fp8",
        lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(4, 4, dtype=torch.float64)}),
        "weight_scale_inv is float64, and not float32 or",
    ),
    "a shape of too many numbers": (
        "ct_w4",
        lambda t: t.update({f"{Q}.weight_shape": torch.ones(1000, dtype=torch.int64)}),
        r"weight_shape is \[1000\], and not \[2\]",
    ),
    "words of another width": (
        "awq",
        lambda t: t.update({f"{Q}.qweight": torch.zeros(64, 16, dtype=torch.int32)}),
        r"qweight is \[64, 16\], and not \[64, 8\]",
    ),
    "a tensor that no format knows": (
        "fp8",
        lambda t: t.update({f"{Q}.weight_offset": torch.ones(4, 4)}),
        rf"{Q}\.weight_offset: stands beside a quantized weight",
    ),
    "one plain weight": (
        "nf4",
        lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{Q}.")],
        "lacks 1 parameters",
    ),
}


@pytest.mark.fault(34)
@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_do_not_fit_are_named(what: str, spoiled: Callable[..., Path], tmp_path: Path) -> None:
    kind, change, words = TENSORS[what]
    with pytest.raises(BadInputError, match=words):
        reshard.convert(spoiled(kind, change), tmp_path / "out", tp_size=2)
    assert not (tmp_path / "out").exists()


TOLD: dict[str, tuple[str, dict[str, Any], str]] = {
    "another block": ("fp8", {"weight_block_size": [8, 8]}, r"weight_scale_inv is \[4, 6\], and not \[8, 12\]"),
    "no block": ("fp8", {"weight_block_size": [0, 0]}, "weight_scale_inv is"),
    "a negative block": ("fp8", {"weight_block_size": [-1, 16]}, "makes no sense"),
    "a block of words": ("fp8", {"weight_block_size": "16"}, "makes no sense"),
    "a huge block": ("fp8", {"weight_block_size": [10**30, 16]}, "makes no sense"),
    "another group": ("gptq", {"group_size": 16}, r"qzeros is \[12, 8\], and not \[6, 8\]"),
    "bits that are none": ("gptq", {"bits": 5}, "in a way that reshard cannot cut"),
    "a layout that is not known": ("awq", {"version": "gemv"}, "in a way that reshard cannot cut"),
    "no groups at all": ("ct_w4", {"config_groups": None}, "in a way that reshard cannot cut"),
    "groups of words": ("ct_w4", {"config_groups": {"a": "b"}}, "in a way that reshard cannot cut"),
    "another method": ("fp8", {"quant_method": "gptq"}, "says that it is quantized by gptq, and no tensor is"),
    "a method of nobody": ("fp8", {"quant_method": "quanto"}, "quantized by quanto, which reshard cannot cut"),
    "a method that is a list": ("fp8", {"quant_method": []}, "which reshard cannot cut"),
    "a module that is left out": ("fp8", {"modules_to_not_convert": [Q]}, rf"leaves out {Q}\.weight"),
    "a layer that is left out": ("nf4", {"llm_int8_skip_modules": ["model.layers.0"]}, "leaves out model.layers.0"),
    "a list that is none": ("fp8", {"modules_to_not_convert": "lm_head"}, "is not a list"),
}


@pytest.mark.fault(34)
@pytest.mark.parametrize("what", TOLD)
def test_a_configuration_that_does_not_fit_is_said(what: str, spoiled: Callable[..., Path], tmp_path: Path) -> None:
    kind, told, words = TOLD[what]
    with pytest.raises(BadInputError, match=words):
        reshard.convert(spoiled(kind, **told), tmp_path / "out", tp_size=2)


@pytest.mark.fault(34)
def test_quantized_tensors_without_a_configuration_are_not_taken_for_weights(
    spoiled: Callable[..., Path], tmp_path: Path
) -> None:
    folder = spoiled("fp8")
    told = json.loads((folder / "config.json").read_text())
    del told["quantization_config"]
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(BadInputError, match="weight_scale_inv: stands beside a weight of 8 bits"):
        reshard.convert(folder, tmp_path / "out", tp_size=2)


_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)


@pytest.mark.fault(34)
@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(kind=st.sampled_from(sorted(KINDS)), data=st.data())
def test_whatever_is_told_of_a_format(kind: str, data: st.DataObject, quantized: Callable[[str], Path]) -> None:
    """It is planned, or there is one error of ours."""
    config = json.loads(json.dumps(KINDS[kind][1]))
    places: list[Any] = [config]
    for group in (config.get("config_groups") or {}).values():
        places += [group, group["weights"]]
    place = data.draw(st.sampled_from(places))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(_VALUES)
    folder = quantized(kind)
    before = (folder / "config.json").read_text()
    try:
        configure(folder, quantization_config=config)
        reshard.plan(folder, tp_size=2)
    except (BadInputError, VersionError):
        pass
    finally:
        (folder / "config.json").write_text(before)


@pytest.mark.fault(34)
def test_a_manifest_whose_bundles_lie_is_malformed(quantized: Callable[[str], Path], tmp_path: Path) -> None:
    from reshard.resharded.manifest import read_manifest, sealed_text

    out = tmp_path / "out"
    reshard.convert(quantized("fp8"), out, tp_size=2)
    good = json.loads((out / "reshard.json").read_text())
    changes: list[Callable[[Any], object]] = [
        lambda m: m["bundles"][0].update(quantization=99),
        lambda m: m["bundles"][0].update(shape=[1 << 40, 64]),
        lambda m: m["bundles"][0]["members"].update({".weight": "lm_head.weight"}),
        lambda m: m["bundles"][0]["members"].pop(".weight"),
        lambda m: m["bundles"][0].update(placement={"type": "replicate"}),
        lambda m: m["bundles"][0].update(blocks=[[1, 2], [64]]),
        lambda m: m["bundles"][0].update(dtype="int8"),
        lambda m: m["quantizations"][0].update(members={".weight": [[0, -1, 1]]}),
        lambda m: m["quantizations"][0].update(members={".weight": [[9, 1, 1], [1, 1, 1]]}),
        lambda m: m["quantizations"][0].update(options=[]),
        lambda m: m["bundles"][0].update(lengths={".weight": [1, 2]}),
        lambda m: m["bundles"][0].update(lengths={".more": [1]}),
        lambda m: m["bundles"][0].update(lengths=[1]),
        lambda m: m.update(bundles=[[]]),
    ]
    for change in changes:
        content = json.loads(json.dumps(good))
        content.pop("seal")
        change(content)
        (out / "reshard.json").write_bytes(sealed_text(content))
        with pytest.raises(IntegrityError, match="incomplete or malformed"):
            read_manifest(out)

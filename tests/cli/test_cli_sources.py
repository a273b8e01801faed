"""`reshard convert` of sources that cannot be used: the exit code, what the one line names, and nothing left behind."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_tools import (
    ESCAPED,
    EVIL,
    FIRST,
    INDEX,
    RANK_FILES,
    Cli,
    Refused,
    assert_one_error,
    configure,
    convert,
    fifo,
    first_file,
    link,
    rewrite,
    single_file,
    weight_map,
)
from safetensors.torch import load_file


@pytest.mark.fault(8)
@pytest.mark.parametrize("length", [0, 4, 8, 9, 1000, 20_000, -1])
def test_truncated_source_file(length: int, source: Path, out: Path, refused: Refused) -> None:
    path = first_file(source)
    os.truncate(path, length if length >= 0 else path.stat().st_size + length)
    refused(3, convert(source, out), path.name)


def test_source_file_with_bytes_after_its_end(source: Path, out: Path, refused: Refused) -> None:
    path = first_file(source)
    path.write_bytes(path.read_bytes() + b"\0")
    refused(3, convert(source, out), path.name)


def _tensor_in_two_files(source: Path) -> None:
    extra = {name: torch.zeros(2) for name in load_file(first_file(source))}
    rewrite(source / "model-00002-of-00003.safetensors", lambda tensors: tensors.update(extra))


def _pickled(source: Path) -> None:
    for path in [*source.glob("*.safetensors"), source / INDEX]:
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _reshape(source: Path) -> None:
    single_file(source, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(130, 16)}))


def _index_to(source: Path, file: str) -> None:
    weight_map(source, lambda found: found.update({"lm_head.weight": file}))


# Each case: what is done to the source, the exit code, and what the error must name.
SPOILT: dict[str, tuple[Callable[[Path], object], int, tuple[str, ...]]] = {
    "missing file": (lambda s: first_file(s).unlink(), 3, (FIRST,)),
    "tensor in two files": (
        _tensor_in_two_files,
        3,
        ("model.embed_tokens.weight", FIRST, "model-00002-of-00003.safetensors"),
    ),
    "index leaves the folder": (lambda s: _index_to(s, "../x.safetensors"), 11, ("../x.safetensors",)),
    "index is absolute": (lambda s: _index_to(s, "/etc/x.safetensors"), 11, ("/etc/x.safetensors",)),
    "index names no string": (lambda s: weight_map(s, lambda f: f.update({"lm_head.weight": 5})), 3, ("lm_head",)),
    "index names a pickle": (lambda s: _index_to(s, "x.bin"), 3, ("x.bin",)),
    "link out": (lambda s: link(first_file(s), s.parent / "elsewhere.safetensors"), 11, (FIRST,)),
    "config links out": (lambda s: link(s / "config.json", s.parent / "c.json"), 11, ("config.json",)),
    "fifo": (lambda s: fifo(first_file(s)), 3, (FIRST,)),
    "fifo as index": (lambda s: fifo(s / INDEX), 3, (INDEX,)),
    "fifo as config": (lambda s: fifo(s / "config.json"), 3, ("config.json",)),
    "folder as file": (lambda s: (first_file(s).unlink(), first_file(s).mkdir()), 3, ("model-00001-of-00003",)),
    "malformed index": (lambda s: (s / INDEX).write_text('{"weight_map": {'), 3, (INDEX, "JSON")),
    "index of nothing": (lambda s: (s / INDEX).write_text('{"weight_map": {}}'), 3, (INDEX,)),
    "index is a list": (lambda s: (s / INDEX).write_text("[]"), 3, (INDEX,)),
    "index nested deeply": (lambda s: (s / INDEX).write_text("[" * 200_000), 3, (INDEX,)),
    "duplicate keys in index": (
        lambda s: (s / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
        3,
        (INDEX, "twice"),
    ),
    "no weights": (lambda s: [p.unlink() for p in (*s.glob("*.safetensors"), s / INDEX)], 3, ("source", INDEX)),
    "no config": (lambda s: (s / "config.json").unlink(), 3, ("config.json",)),
    "config is a list": (lambda s: (s / "config.json").write_text("[1]"), 3, ("config.json",)),
    "config is garbage": (lambda s: (s / "config.json").write_bytes(b"\xff\x00{"), 3, ("config.json",)),
    "config is empty": (lambda s: (s / "config.json").write_bytes(b""), 3, ("config.json",)),
    "unknown model type": (lambda s: configure(s, model_type="nope"), 8, ("nope", "transformers")),
    "unknown architecture": (
        lambda s: configure(s, model_type="vit", architectures=["NopeForCausalLM"]),
        8,
        ("NopeForCausalLM", "vit"),
    ),
    "absurd layers": (lambda s: configure(s, num_hidden_layers=10**12), 3, ("config.json", "num_hidden_layers")),
    "absurd vocabulary": (lambda s: configure(s, vocab_size=10**18), 3, ("config.json",)),
    "wrong type in config": (lambda s: configure(s, hidden_size="big"), 3, ("config.json", "hidden_size")),
    "heads of nothing": (lambda s: configure(s, num_attention_heads=0), 3, ("config.json",)),
    "control characters in config": (lambda s: configure(s, hidden_act=EVIL), 3, ("config.json", "evil\\x1b")),
    "quantized": (lambda s: configure(s, quantization_config={"quant_method": "gptq"}), 3, ("quantized", "gptq")),
    "missing parameter": (
        lambda s: single_file(s, lambda tensors: tensors.pop("model.norm.weight")),
        3,
        ("lacks 1 ", "model.norm.weight"),
    ),
    "more layers than tensors for": (lambda s: configure(s, num_hidden_layers=3), 3, ("model.layers.2.",)),
    "wrong shape": (_reshape, 3, ("lm_head.weight", "[130, 32]", "[130, 16]")),
    "architecture is a number": (lambda s: configure(s, architectures=[5]), 3, ("config.json",)),
    "architecture is abstract": (
        lambda s: configure(s, model_type="vit", architectures=["PreTrainedModel"]),
        8,
        ("PreTrainedModel",),
    ),
}


@pytest.mark.fault(9, 12, 13, 14)
@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_source(case: str, source: Path, out: Path, refused: Refused) -> None:
    spoil, code, mentions = SPOILT[case]
    spoil(source)
    started = time.monotonic()
    refused(code, convert(source, out), *mentions)
    assert time.monotonic() - started < 5


def test_pickled_weights_have_a_way_out(source: Path, out: Path, refused: Refused) -> None:
    _pickled(source)
    refused(3, convert(source, out), "pytorch_model.bin", hint="transformers")


@pytest.mark.fault(14)
def test_absurd_layers_under_another_name(source: Path, out: Path, cli: Cli) -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 10**6}
    (source / "config.json").write_text(json.dumps(config))
    assert_one_error(cli(*convert(source, out), seconds=3), 3, "config.json")
    assert os.listdir(out.parent) == ["source"]


def test_folder_named_like_a_license_is_no_obstacle(source: Path, out: Path, cli: Cli) -> None:
    (source / "LICENSES").mkdir()
    assert cli(*convert(source, out)).code == 0


def test_link_inside_the_folder_is_followed(source: Path, out: Path, cli: Cli, resharded: Path) -> None:
    link(first_file(source), source / "blob")
    assert cli(*convert(source, out)).code == 0
    for name in RANK_FILES:
        assert (out / name).read_bytes() == (resharded / name).read_bytes()


@pytest.mark.fault(28)
def test_control_characters_in_names_of_files_are_escaped(source: Path, out: Path, refused: Refused) -> None:
    _index_to(source, f"{EVIL}.safetensors")
    refused(3, convert(source, out), ESCAPED)


def test_unknown_style(source: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig

    monkeypatch.setitem(LlamaConfig.base_model_tp_plan, "layers.*.mlp.gate_proj", "made_up")
    refused(3, convert(source, out), "made_up", hint="known styles: ")
    assert "colwise" in refused(3, convert(source, out)).hint


def test_unknown_style_of_a_module_without_parameters(
    source: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig

    monkeypatch.setitem(LlamaConfig.base_model_tp_plan, "layers.*.mlp", "made_up")
    refused(3, convert(source, out), "made_up", hint="known styles: ")


@pytest.mark.parametrize("size", [9, 16, 64, 10**9])
def test_ranks_that_do_not_fit(size: int, source: Path, out: Path, refused: Refused) -> None:
    refused(9, ["convert", source, out, "--tp-size", size], f"{size} ranks", hint="legal sizes: 1–8")


# --- no source at all ---


def test_no_such_source(out: Path, tmp_path: Path, refused: Refused) -> None:
    refused(3, convert(tmp_path / "not" / "there", out), "not/there: no such folder")
    refused(3, convert("./not-there", out), "./not-there: no such folder")


def test_source_is_a_file(source: Path, out: Path, refused: Refused) -> None:
    refused(3, convert(first_file(source), out), first_file(source).name)


def test_hub_is_offline(out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(10, convert("reshard-tests/nothing", out), "reshard-tests/nothing", hint="local folder")
    refused(10, ["inspect", "reshard-tests/nothing"], "reshard-tests/nothing")


@pytest.mark.usefixtures("here")
def test_hub_cannot_be_reached(out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(10, convert("reshard-tests/nothing", out), "reshard-tests/nothing", "does not answer", hint="connection")

"""Quantized checkpoints on several ranks: each format computes what one process computes, and gives its bytes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import Checkpoint
from places import WORKERS
from quantizing import KINDS, quantize_folder
from single_process import NEW_TOKENS
from torchrun_tools import on_ranks

import reshard
from reshard.operations.reference import single_model

IDS = torch.randint(3, 130, (2, 12), generator=torch.Generator().manual_seed(7))
_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3}
_EXPERTS = {**_HEADS, "num_experts": 4, "moe_intermediate_size": 48, "intermediate_size": 96}
# name → family and options. Even: rows are whole blocks of every format. Ragged: 4 1/2 blocks of fp8, 1 1/8 of nf4.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "even": ("qwen2", {**_HEADS, "hidden_size": 192, "intermediate_size": 320}),
    "ragged": ("llama", {**_HEADS, "hidden_size": 72, "head_dim": 16, "intermediate_size": 104}),
    "experts": ("qwen3_moe", {**_EXPERTS, "hidden_size": 64, "head_dim": 16}),
}
_IN_BLOCKS = ("ct_nvfp4", "mxfp8", "modelopt_nvfp4")  # the library quantizes whole blocks only
RUN = [kind for kind in KINDS if not kind.startswith("modelopt")]
CASES = [
    (name, kind)
    for name in MODELS
    for kind in KINDS
    if not (name == "ragged" and kind in _IN_BLOCKS) and not (name == "experts" and kind == "nf4_nested")
]
SIZES = (2, 3)
EP = {2: 2, 3: 1}


@pytest.fixture(scope="module")
def source(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    root = tmp_path_factory.mktemp("quantized")

    def made(name: str, kind: str) -> Path:
        folder = root / f"{name}-{kind}"
        family, options = MODELS[name]
        return folder if folder.exists() else quantize_folder(checkpoint(family, **options), folder, kind)

    return made


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"tp{size}")
def ranks(request: pytest.FixtureRequest, source: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The number of ranks, the folders, and what the ranks computed with those that transformers can run."""
    size, root, folders = request.param, tmp_path_factory.mktemp("out"), {}
    for name, kind in CASES:
        ep = EP[size] if name == "experts" else 1
        folders[name, kind] = root / f"{name}-{kind}"
        reshard.convert(source(name, kind), folders[name, kind], tp_size=size, ep_size=ep, sync=False)
    jobs = [
        {"name": folder.name, "folder": str(folder), "ids": IDS.tolist(), "new_tokens": NEW_TOKENS}
        for (_, kind), folder in folders.items()
        if kind in RUN
    ]
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = on_ranks(size, str(WORKERS / "parity.py"), str(root / "jobs.json"), str(root / "out.json"))
    assert done.returncode == 0, done.stderr
    return size, folders, root


@pytest.fixture(scope="module")
def single(source: Any) -> Callable[[str, str], Any]:
    made: dict[tuple[str, str], dict[str, Any]] = {}

    def of(name: str, kind: str) -> dict[str, Any]:
        if (name, kind) not in made:
            model = single_model(source(name, kind), torch.float32)
            with torch.inference_mode():
                logits = model(IDS).logits
            ones = torch.ones_like(IDS)
            tokens = model.generate(IDS, attention_mask=ones, max_new_tokens=NEW_TOKENS, do_sample=False)
            made[name, kind] = {"logits": logits, "tokens": tokens.tolist(), "parameters": dict(model.state_dict())}
        return made[name, kind]

    return of


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[1] in RUN])
def test_it_computes_what_one_process_does(name: str, kind: str, ranks: Any, single: Any) -> None:
    _, folders, root = ranks
    called = folders[name, kind].name
    got = {**json.loads((root / "out.json").read_text())[called], **torch.load(root / f"out.json.{called}.pt")}
    expected = single(name, kind)
    assert (got["logits"] - expected["logits"]).abs().max() <= 1e-5 * expected["logits"].abs().max()
    assert got["tokens"] == expected["tokens"]
    assert got["parameters"].keys() == expected["parameters"].keys()
    for parameter, tensor in got["parameters"].items():
        assert torch.equal(tensor, expected["parameters"][parameter]), parameter


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_folder_gives_the_source_back(name: str, kind: str, ranks: Any, source: Any, tmp_path: Path) -> None:
    _, folders, _ = ranks
    reshard.verify(folders[name, kind], against=source(name, kind))
    reshard.merge(folders[name, kind], tmp_path / "merged")
    for path in source(name, kind).glob("*.safetensors"):
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "merged" / "config.json").read_bytes() == (source(name, kind) / "config.json").read_bytes()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_from_one_number_of_ranks_to_another(name: str, kind: str, ranks: Any, source: Any, tmp_path: Path) -> None:
    size, folders, _ = ranks
    other = {2: 3, 3: 2}[size]
    options = {"tp_size": other, "ep_size": EP[other] if name == "experts" else 1}
    reshard.convert(source(name, kind), tmp_path / "direct", sync=False, **options)
    reshard.convert(folders[name, kind], tmp_path / "again", sync=False, **options)
    for path in (tmp_path / "direct").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name

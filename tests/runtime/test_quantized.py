"""Quantized checkpoints on several ranks, dequantised: each format computes what one process computes, and gives its
bytes back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli_tools import Checkpoint
from places import WORKERS
from quantized_cases import EVERY, MODELS, is_run
from quantizing import quantize_folder
from safetensors.torch import load_file, save_file
from single_process import NEW_TOKENS
from torchrun_tools import on_ranks

import reshard
from reshard.checkpoint.quantization import quantization_of, without_quantization
from reshard.errors import IntegrityError
from reshard.operations.reference import single_model
from runtime.model.quantized.agreed import check_quantized

IDS = torch.randint(3, 130, (2, 12), generator=torch.Generator().manual_seed(7))
# What runs each time; the rest is slow. Each format is there, and each model with two numbers of ranks.
SAMPLE = {
    2: [("even", "ct_w4_zero"), ("even", "gptq_order"), ("ragged", "nf4_nested"), ("experts", "fp8"), ("even", "awq")],
    3: [
        ("ragged", "fp8"),
        ("ragged", "nf4"),
        ("experts", "nf4_nested"),
        ("even", "ct_fp8_block"),
        ("experts", "ct_w4"),
        ("ragged", "int8"),
    ],
}
EP = {2: 2, 3: 1}  # by the number of ranks, for experts
OTHER = {2: 3, 3: 2}
CASES = [
    pytest.param(size, *case, marks=() if case in SAMPLE[size] else pytest.mark.slow, id=f"tp{size}-{'-'.join(case)}")
    for size in SAMPLE
    for case in EVERY
]


@pytest.fixture(scope="module")
def source(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    root = tmp_path_factory.mktemp("quantized")

    def made(name: str, kind: str) -> Path:
        folder = root / f"{name}-{kind}"
        family, options = MODELS[name]
        return folder if folder.exists() else quantize_folder(checkpoint(family, **options), folder, kind)

    return made


@pytest.fixture(scope="module")
def folder(source: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str, str], Path]:
    root = tmp_path_factory.mktemp("out")

    def converted(size: int, name: str, kind: str) -> Path:
        out = root / f"{name}-{kind}-{size}"
        if not out.exists():
            reshard.convert(source(name, kind), out, sync=False, **ranks_of(size, name))
        return out

    return converted


def ranks_of(size: int, name: str) -> dict[str, int]:
    return {"tp_size": size, "ep_size": EP[size] if name == "experts" else 1}


@pytest.fixture(scope="module")
def computed(request: pytest.FixtureRequest, folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the ranks computed: all cases of a size that are asked for in one job."""
    asked = {
        item.callspec.id for item in request.session.items if item.path == request.path and hasattr(item, "callspec")
    }
    done: dict[int, Path] = {}

    def results(size: int) -> Path:
        if size not in done:
            root = done[size] = tmp_path_factory.mktemp(f"tp{size}")
            cases = [case for case in EVERY if is_run(case[1]) and f"tp{size}-{'-'.join(case)}" in asked]
            jobs = [{"name": "-".join(case), "folder": str(folder(size, *case)), **JOB} for case in cases]
            (root / "jobs.json").write_text(json.dumps(jobs))
            run = on_ranks(size, str(WORKERS / "parity.py"), str(root / "jobs.json"), str(root / "out.json"))
            assert run.returncode == 0, run.stderr
        return done[size]

    return results


JOB = {"ids": IDS.tolist(), "new_tokens": NEW_TOKENS, "compute": "dequantised"}


@pytest.mark.parametrize(("size", "name", "kind"), [case for case in CASES if is_run(case.values[2])])
def test_it_computes_what_one_process_does(size: int, name: str, kind: str, computed: Any, source: Any) -> None:
    root, called = computed(size), f"{name}-{kind}"
    got = {**json.loads((root / "out.json").read_text())[called], **torch.load(root / f"out.json.{called}.pt")}
    single = single_model(source(name, kind), torch.float32)
    with torch.inference_mode():
        logits = single(IDS).logits
    tokens = single.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW_TOKENS, do_sample=False)
    assert (got["logits"] - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert got["tokens"] == tokens.tolist()
    expected = single.state_dict()
    assert got["parameters"].keys() == expected.keys()
    for parameter, tensor in got["parameters"].items():
        assert torch.equal(tensor, expected[parameter]), parameter


@pytest.mark.parametrize(("size", "name", "kind"), CASES)
def test_the_folder_gives_the_source_back(
    size: int, name: str, kind: str, folder: Any, source: Any, tmp_path: Path
) -> None:
    out = folder(size, name, kind)
    reshard.verify(out, against=source(name, kind))
    reshard.merge(out, tmp_path / "merged")
    for path in [*source(name, kind).glob("*.safetensors"), source(name, kind) / "config.json"]:
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("size", "name", "kind"), CASES)
def test_from_one_number_of_ranks_to_another(
    size: int, name: str, kind: str, folder: Any, source: Any, tmp_path: Path
) -> None:
    again = reshard.convert(folder(size, name, kind), tmp_path / "again", sync=False, **ranks_of(OTHER[size], name))
    direct = reshard.convert(source(name, kind), tmp_path / "direct", sync=False, **ranks_of(OTHER[size], name))
    assert again == direct
    for path in (tmp_path / "direct").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_it_is_checked_and_saved(folder: Any, source: Any, tmp_path: Path) -> None:
    """`check --per-layer` finds a changed weight; `save_pretrained` writes the dequantised weights, a plain model."""
    made, origin, out = folder(3, "ragged", "nf4"), source("ragged", "nf4"), tmp_path / "out.json"
    done = on_ranks(3, str(WORKERS / "quantized.py"), str(made), str(origin), str(tmp_path / "saved"), str(out))
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    assert told["good"]["ok"], told["good"]
    assert told["good"]["max_rel"] <= 1e-5
    found = told["bad"]["difference"]
    assert (found["module"], [one["name"] for one in found["altered"]]) == (
        "model.layers.1.mlp.down_proj",
        ["model.layers.1.mlp.down_proj.weight"],
    )
    assert told["quantization"] is None
    assert "compute: dequantised, 14 quantized parameters" in told["report"]
    single = single_model(origin, torch.float32).state_dict()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, single[name]), name


def test_a_dtype_is_for_what_is_not_quantized(folder: Any, source: Any, tmp_path: Path) -> None:
    """`--dtype` casts plain weights, and the dtype that is computed in; no scale and no number of few bits."""
    plain = reshard.inspect(folder(2, "even", "awq"))
    cast = reshard.convert(source("even", "awq"), tmp_path / "cast", tp_size=2, dtype=torch.bfloat16)
    inside = {name for bundle in cast.bundles for name in bundle.quantized.members}
    assert {target.dtype for target in cast.parameters if target.name not in inside} == {"bfloat16"}
    assert {bundle.target.dtype for bundle in cast.bundles} == {"bfloat16"}
    for one, other in zip(plain.rank_files, cast.rank_files, strict=True):
        assert {name: one.tensors[name] for name in inside} == {name: other.tensors[name] for name in inside}


LAYER = "model.layers.0"


def test_a_quantized_layer_that_the_model_lacks_is_kept(source: Any, tmp_path: Path) -> None:
    """As that of DeepSeek-V3 for multi-token prediction: its tensors are kept apart, and given back."""
    folder = Path(shutil.copytree(source("ragged", "fp8"), tmp_path / "source"))
    (file,) = (file for file in folder.glob("*.safetensors") if f"{LAYER}.mlp.up_proj.weight" in load_file(file))
    tensors = load_file(file)
    more = {name.replace(LAYER, "model.layers.9"): t.clone() for name, t in tensors.items() if name.startswith(LAYER)}
    save_file({**tensors, **more}, file)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"] | dict.fromkeys(more, file.name)
    index.write_text(json.dumps({"weight_map": places}))
    manifest = reshard.convert(folder, tmp_path / "out", tp_size=2)
    assert manifest.unused_file is not None
    assert manifest.unused_file.tensors.keys() == more.keys()
    reshard.merge(tmp_path / "out", tmp_path / "merged")
    assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()


def test_ranks_agree_with_transformers_about_what_is_quantized(folder: Any, tmp_path: Path) -> None:
    """A list that transformers reads otherwise than the checkpoint was made ends the load on every rank, with 4."""
    out = Path(shutil.copytree(folder(2, "even", "awq"), tmp_path / "out"))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["re_proj", "o_proj"]
    (out / "config.json").write_text(json.dumps(config))
    code = "import runtime; runtime.load(__import__('sys').argv[1], check_digests=False)"
    (tmp_path / "load.py").write_text(code)
    done = on_ranks(2, str(tmp_path / "load.py"), str(out))
    assert done.returncode != 0
    assert "transformers takes other modules for quantized than the checkpoint has" in done.stderr
    assert "self_attn.o_proj" in done.stderr


LEFT_OUT = {  # a list that transformers reads otherwise than the checkpoint was made, and a module of it
    ("even", "awq"): ("modules_to_not_convert", "o_proj"),
    ("ragged", "nf4"): ("llm_int8_skip_modules", "down_proj"),
    ("even", "ct_w4_zero"): ("ignore", "re:.*down_proj"),
    ("experts", "fp8"): ("modules_to_not_convert", "model.layers.0.mlp.experts"),
}


@pytest.mark.parametrize(("name", "kind"), LEFT_OUT)
def test_each_format_is_compared_with_what_transformers_reads(name: str, kind: str, folder: Any) -> None:
    size = 3 if (name, kind) in SAMPLE[3] else 2
    manifest = reshard.inspect(folder(size, name, kind))
    told = quantization_of(json.loads((folder(size, name, kind) / "config.json").read_text()))
    assert told is not None
    config = transformers.AutoConfig.from_pretrained(folder(size, name, kind))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(without_quantization(config))
    check_quantized(manifest, model, told)
    key, module = LEFT_OUT[name, kind]
    with pytest.raises(IntegrityError, match="other modules for quantized.*" + module.removeprefix("re:.*")):
        check_quantized(manifest, model, {**told, key: [module, "lm_head"]})

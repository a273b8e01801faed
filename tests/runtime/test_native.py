"""Quantized checkpoints on several ranks, computed with by their libraries: as transformers does it in one process."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized_cases
import torch
import transformers
from cli_tools import Checkpoint
from places import WORKERS
from quantized_cases import MODELS
from quantizing import KINDS, _awq, _gptq, quantize_folder
from safetensors.torch import load_file
from single_process import NEW_TOKENS
from torchrun_tools import on_ranks

import reshard
from reshard.checkpoint.quantization import quantization_of
from reshard.operations.reference import distance, rounding, single_model
from runtime.model.quantized.libraries.bitsandbytes import _FAST
from runtime.model.quantized.single import native_model, quantizes_inputs, shaken

IDS = torch.randint(3, 130, (2, 12), generator=torch.Generator().manual_seed(7))
MODULE = "model.layers.1.mlp.down_proj"  # cut along its inputs
# ranks, model, kind. Rows of "ragged" are no whole scales of nf4, so that libraries take none, or some, of them.
SAMPLE = [
    (2, "even", "nf4"),
    (2, "even", "int8"),
    (3, "even", "nf4_nested"),
    (3, "even", "fp4_bf16"),
    (3, "ragged", "int8"),
    (2, "even", "torchao_int8"),
]
SLOW = [
    (2, "even", "nf4_nested"),
    (2, "even", "fp4_bf16"),
    (3, "even", "nf4"),
    (3, "even", "int8"),
    (2, "ragged", "int8"),
    (3, "even", "torchao_int8"),
]
CASES = [
    pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.slow, id="-".join(map(str, case)))
    for case in [*SAMPLE, *SLOW]
]


@pytest.fixture(scope="module")
def source(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    root = tmp_path_factory.mktemp("quantized")

    def made(name: str, kind: str) -> Path:
        folder, (family, options) = root / f"{name}-{kind}", MODELS[name]
        return folder if folder.exists() else quantized_cases.quantized(checkpoint(family, **options), folder, kind)

    return made


@pytest.fixture(scope="module")
def computed(
    request: pytest.FixtureRequest, source: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """What the ranks computed: all cases of a size that are asked for in one job."""
    asked = [item.callspec.params for item in request.session.items if item.path == request.path and _is_case(item)]
    done: dict[int, Path] = {}

    def results(size: int) -> Path:
        if size not in done:
            root = done[size] = tmp_path_factory.mktemp(f"tp{size}")
            cases = dict.fromkeys((one["name"], one["kind"]) for one in asked if one["size"] == size)
            jobs = [_job(root, source(*case), size, *case) for case in cases]
            (root / "jobs.json").write_text(json.dumps(jobs))
            run = on_ranks(size, str(WORKERS / "native.py"), str(root / "jobs.json"), str(root))
            assert run.returncode == 0, run.stderr
        return done[size]

    return results


def _is_case(item: Any) -> bool:
    return hasattr(item, "callspec") and "kind" in item.callspec.params


def _job(root: Path, source: Path, size: int, name: str, kind: str) -> dict[str, Any]:
    out = root / f"folder-{name}-{kind}"
    reshard.convert(source, out, tp_size=size, dtype=torch.float32, sync=False)
    torch.save(_inputs(name), root / f"{name}.inputs.pt")
    return {
        "name": f"{name}-{kind}",
        "folder": str(out),
        "ids": IDS.tolist(),
        "new_tokens": NEW_TOKENS,
        "module": MODULE,
        "inputs": str(root / f"{name}.inputs.pt"),
        "compile": kind == "nf4",
        "compute": "native",
    }


def _inputs(name: str) -> torch.Tensor:
    """Return activations with outliers, which int8 does not quantize, and with a token of zeros."""
    size = MODELS[name][1]["intermediate_size"]
    inputs = torch.randn(2, 5, size, generator=torch.Generator().manual_seed(3))
    inputs[0, 1, 7], inputs[1, 2, size - 1], inputs[1, 3] = 30.0, -20.0, 0.0
    return inputs


def _theirs(source: Path) -> Any:
    """Return the model as transformers loads it, with its plain weights in fp32, computing in fp32 on every CPU."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for tensor in [*model.parameters(), *model.buffers()]:
        if type(tensor) in (torch.nn.Parameter, torch.Tensor) and tensor.is_floating_point():
            tensor.data = tensor.data.float()
    for module in model.modules():
        if hasattr(module, _FAST):
            setattr(module, _FAST, False)
    return model


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("size", "name", "kind"), CASES)
def test_it_computes_what_transformers_does(size: int, name: str, kind: str, computed: Any, source: Any) -> None:
    got = torch.load(computed(size) / f"{name}-{kind}.pt")
    single, ones = _theirs(source(name, kind)), torch.ones_like(IDS)
    with torch.inference_mode():
        logits = single(IDS).logits
        made = single.get_submodule(MODULE)(_inputs(name))
        with shaken(single):
            limit = rounding(logits, single(IDS).logits) if quantizes_inputs(single) else 1e-5
    tokens = single.generate(IDS, attention_mask=ones, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert distance(got["made"], made)[1] <= 1e-6  # of a module that is cut along its inputs, int8 too
    assert distance(got["logits"], logits)[1] <= limit < 0.1
    assert distance(got["compiled"], logits)[1] <= limit
    assert got["tokens"].tolist() == tokens.tolist()


@pytest.mark.parametrize(("size", "name", "kind"), CASES)
def test_its_tensors_are_those_of_the_source(size: int, name: str, kind: str, computed: Any, source: Any) -> None:
    """`full_tensor` dequantises a quantized parameter, and has the tensors of the files too."""
    found = torch.load(computed(size) / f"{name}-{kind}.pt")["parameters"]
    stored, plain = _tensors(source(name, kind)), single_model(source(name, kind), torch.float32).state_dict()
    assert found.keys() == stored.keys() | plain.keys()
    for called, tensor in found.items():
        expected = plain[called] if called in plain else stored[called].reshape(tensor.shape)
        assert torch.equal(tensor, expected), called


@pytest.mark.parametrize(("size", "name", "kind"), CASES)
def test_it_is_saved_as_it_was_quantized(size: int, name: str, kind: str, computed: Any, source: Any) -> None:
    """What is saved has the source's tensors, and transformers opens it as it opens the source."""
    saved, before = _tensors(computed(size) / f"{name}-{kind}"), _tensors(source(name, kind))
    assert saved.keys() == before.keys()
    for called, tensor in saved.items():
        assert tensor.shape == before[called].shape, called
        exact = tensor.dtype == before[called].dtype  # the others were cast to fp32 when they were resharded
        assert _bytes(tensor) == _bytes(before[called] if exact else before[called].to(tensor.dtype)), called
    config = json.loads((computed(size) / f"{name}-{kind}" / "config.json").read_text())
    told = quantization_of(json.loads((source(name, kind) / "config.json").read_text()))
    assert told is not None
    assert config["quantization_config"]["quant_method"] == told["quant_method"]
    with torch.inference_mode():
        logits = _theirs(computed(size) / f"{name}-{kind}")(IDS).logits
        assert torch.equal(logits, _theirs(source(name, kind))(IDS).logits)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_rank_has_the_quantized_bytes_in_memory(computed: Any, source: Any) -> None:
    """Half a byte for each weight, and a scale in fp32 for 64, also for nested nf4, whose scales are dequantised."""
    for size, kind in ((2, "nf4"), (3, "nf4_nested")):
        report = torch.load(computed(size) / f"even-{kind}.pt")["report"]
        weights = sum(
            math.prod(target.shape)
            for target in (bundle.target for bundle in reshard.inspect(computed(size) / f"folder-even-{kind}").bundles)
        )
        expected = weights * (1 / 2 + 4 / 64) / size / 1e6
        assert f"compute: native, 14 quantized parameters by bitsandbytes: {expected:,.1f} MB" in report


def test_what_no_library_takes_is_dequantised(source: Any, tmp_path: Path) -> None:
    """bitsandbytes has no module for fused experts. The model is saved as it was quantized all the same."""
    folder = source("experts", "nf4")
    job = {**_job(tmp_path, folder, 2, "experts", "nf4"), "module": "model.layers.1.self_attn.o_proj"}
    inputs = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(3))
    torch.save(inputs, job["inputs"])
    (tmp_path / "jobs.json").write_text(json.dumps([{**job, "compute": "auto", "compile": False}]))
    run = on_ranks(2, str(WORKERS / "native.py"), str(tmp_path / "jobs.json"), str(tmp_path))
    assert run.returncode == 0, run.stderr
    got = torch.load(tmp_path / "experts-nf4.pt")
    assert "compute: native, 8 quantized parameters by bitsandbytes" in got["report"]
    why = re.findall(r"^compute: dequantised, (\d+) .*; (.*)$", got["report"], re.M)
    assert why == [
        ("3", "a scale is for 64 values, and some rows are not whole scales"),
        ("2", "it is not the weight of a linear layer"),
    ]
    single = single_model(folder, torch.float32)
    with torch.inference_mode():
        assert distance(got["logits"], single(IDS).logits)[1] <= 1e-5
        assert distance(got["made"], single.get_submodule(job["module"])(inputs))[1] <= 1e-6
    for called, tensor in single.state_dict().items():
        assert torch.equal(got["parameters"][called], tensor), called
    saved, before = _tensors(tmp_path / "experts-nf4"), _tensors(folder)
    assert {name: _bytes(tensor) for name, tensor in saved.items()} == {n: _bytes(t) for n, t in before.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_by_rounding(dtype: torch.dtype, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """With biases, which the library's modules would cast for good. Some CPUs have a kernel for bf16."""
    told = {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    quantize, config = KINDS["nf4"]
    folder = quantize_folder(
        checkpoint("qwen2", **MODELS["even"][1]), tmp_path / "source", (quantize, {**config, **told})
    )
    job = _job(tmp_path, folder, 2, "even", "nf4")
    reshard.convert(folder, tmp_path / "half", tp_size=2, dtype=dtype, sync=False)
    (tmp_path / "jobs.json").write_text(json.dumps([{**job, "folder": str(tmp_path / "half"), "compile": False}]))
    run = on_ranks(2, str(WORKERS / "native.py"), str(tmp_path / "jobs.json"), str(tmp_path))
    assert run.returncode == 0, run.stderr
    got = torch.load(tmp_path / "even-nf4.pt")["logits"]
    names = [bundle.target.name for bundle in reshard.inspect(tmp_path / "half").bundles]
    with torch.inference_mode():
        theirs = native_model(folder, dtype, torch.device("cpu"), names)(IDS).logits
        exact = _theirs(folder)(IDS).logits
    assert got.dtype == theirs.dtype == dtype
    assert distance(got, theirs)[1] <= rounding(theirs.float(), exact) < 0.2


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False}
OF_GPTQMODEL = {
    "gptq": (_gptq(16), _GPTQ, torch.float32),
    "gptq_order": (_gptq(16, by_activity=True), {**_GPTQ, "desc_act": True}, torch.float32),
    "gptq_8": (*KINDS["gptq_8"], torch.float32),
    "awq": (_awq(16), {**KINDS["awq"][1], "group_size": 16}, torch.float16),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", OF_GPTQMODEL)
def test_gptqmodel_computes_what_dequantised_weights_do(
    kind: str, size: int, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """It is not among the packages of the tests: see tests/README.md."""
    pytest.importorskip("gptqmodel")
    quantize, config, dtype = OF_GPTQMODEL[kind]
    plain = checkpoint("qwen2", **{**MODELS["even"][1], "intermediate_size": 384})
    folder = quantize_folder(plain, tmp_path / "source", (quantize, config))
    job = _job(tmp_path, folder, size, "even", kind)
    torch.save(torch.randn(2, 5, 384, generator=torch.Generator().manual_seed(3)).to(dtype), job["inputs"])
    reshard.convert(folder, tmp_path / "cast", tp_size=size, dtype=dtype, sync=False)
    (tmp_path / "jobs.json").write_text(json.dumps([{**job, "folder": str(tmp_path / "cast")}]))
    run = on_ranks(size, str(WORKERS / "native.py"), str(tmp_path / "jobs.json"), str(tmp_path), timeout=900)
    assert run.returncode == 0, run.stderr
    got = torch.load(tmp_path / f"even-{kind}.pt")
    assert "compute: native, 14 quantized parameters by gptqmodel" in got["report"]
    with torch.inference_mode():
        half, exact = (single_model(folder, one)(IDS).logits.float() for one in (dtype, torch.float32))
    limit = 1e-5 if dtype == torch.float32 else rounding(half, exact)
    assert distance(got["logits"], half)[1] <= limit < 0.1
    stored = _tensors(folder)
    assert all(
        _bytes(tensor) == _bytes(stored[name])
        for name, tensor in _tensors(tmp_path / f"even-{kind}").items()
        if "proj.bias" not in name and tensor.dtype == stored[name].dtype
    )

"""`--quantize` and `--dequantize`: what one process quantizes, cut; and what is said of it afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import quantized_cases
import torch
import transformers
from cli_tools import Checkpoint, Cli, Refused, configure, file_of, reseal, rewrite, tree
from cutting import same
from fake_hub import FakeHub
from jsonschema import Draft202012Validator
from quantizing import quantize_folder
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, FineGrainedFP8Config

import reshard
from reshard.checkpoint.naming import Naming
from reshard.checkpoint.quantization import QUANTIZATIONS
from reshard.checkpoint.source import open_source
from reshard.errors import BadInputError, IntegrityError, UsageError, VersionError
from reshard.operations.values.in_memory import dequantised_tensors
from reshard.transforms.quantise import RECIPES

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": (
        "llama",
        {"hidden_size": 96, "intermediate_size": 160, "num_key_value_heads": 8},
    ),  # rows of no whole blocks too
    "experts": ("qwen3_moe", {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64}),
}
NESTED = {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "bfloat16", "bnb_4bit_compute_dtype": "float16"}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("nf4", {}),
    "nested": ("nf4", NESTED),
    "fp4": ("fp4", {"llm_int8_skip_modules": ["lm_head", "q_proj"]}),
    "int8": ("int8", {}),
    "fp8": ("fp8", {"weight_block_size": [16, 16]}),
}
CASES = [(model, case) for model in MODELS for case in CONFIGS]
Single = Callable[[str, str], tuple[dict[str, torch.Tensor], dict[str, Any]]]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def origin(checkpoint: Checkpoint) -> Callable[[str], Path]:
    def found(model: str) -> Path:
        family, options = MODELS[model]
        return checkpoint(family, dtype=torch.bfloat16, **options)

    return found


@pytest.fixture(scope="module")
def single(origin: Any, tmp_path_factory: pytest.TempPathFactory) -> Single:
    """What one process quantizes and saves: tensors and configuration. It cannot quantize to fp8 without a GPU: there
    every matrix that it would quantize is given to its `Fp8Quantize`."""
    known: dict[tuple[str, str], Any] = {}
    root = tmp_path_factory.mktemp("single")

    def made(model: str, case: str) -> Any:
        if (model, case) not in known:
            kind, options = CONFIGS[case]
            by = _by_fp8 if kind == "fp8" else _by_bitsandbytes
            known[model, case] = by(origin(model), kind, options, root / f"{model}-{case}")
        return known[model, case]

    return made


def _by_bitsandbytes(folder: Path, kind: str, options: dict[str, Any], saved: Path) -> Any:
    how = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    config = BitsAndBytesConfig(**how, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(saved)
    return tensors_of(saved), config_of(saved)


def _by_fp8(folder: Path, kind: str, options: dict[str, Any], saved: Path) -> Any:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = FineGrainedFP8Config(**options)

    class Quantizer:
        quantization_config = config

    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors_of(folder).items():
        layer = tensor.ndim == 2 and "layers" in name and not name.endswith("mlp.gate.weight")
        found |= Fp8Quantize(Quantizer()).convert({name: tensor}) if layer else {name: tensor}
    return found, {**config_of(folder), "quantization_config": json.loads(json.dumps(config.to_dict()))}


@pytest.mark.parametrize(("model", "case"), CASES)
def test_the_result_is_that_of_one_process_whatever_the_ranks(
    model: str, case: str, origin: Any, single: Single, tmp_path: Path
) -> None:
    kind, options = CONFIGS[case]
    expected, config = single(model, case)
    for size in (1, 2, 3):
        out, merged = tmp_path / f"out-{size}", tmp_path / f"merged-{size}"
        reshard.convert(origin(model), out, tp_size=size, quantize=kind, quantize_config=options, sync=False)
        reshard.verify(out)
        reshard.merge(out, merged, layout="hf", sync=False)
        found = tensors_of(merged)
        assert found.keys() == expected.keys()
        wrong = [name for name, one in expected.items() if one.dtype != found[name].dtype or not same(one, found[name])]
        assert not wrong
        assert config_of(out) == config_of(merged) == config


@pytest.fixture(scope="module")
def quantized(origin: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model in nested nf4, for 2 ranks."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    reshard.convert(origin("dense"), out, tp_size=2, quantize="nf4", quantize_config=NESTED, sync=False)
    return out


def test_it_is_the_conversion_of_the_quantized_checkpoint(quantized: Path, tmp_path: Path) -> None:
    """The same bytes, and the manifest has the files of that checkpoint with their digests."""
    reshard.merge(quantized, tmp_path / "merged", layout="hf", sync=False)
    again = reshard.convert(tmp_path / "merged", tmp_path / "again", tp_size=2, sync=False)
    before = reshard.convert(quantized, tmp_path / "same", tp_size=2, sync=False)
    assert again.rank_files == before.rank_files
    assert again.source_files == before.source_files
    assert before.derived is not None
    assert again.derived is None
    reshard.verify(quantized, against=tmp_path / "merged")


def test_any_threads_and_a_resharded_source_give_the_same_folder(origin: Any, quantized: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tp_size": 2, "quantize": "nf4", "quantize_config": NESTED, "sync": False}
    reshard.convert(origin("dense"), tmp_path / "threads", workers=7, **options)
    assert tree(tmp_path / "threads") == tree(quantized)
    reshard.convert(origin("dense"), tmp_path / "plain", tp_size=3, sync=False)
    made = reshard.convert(tmp_path / "plain", tmp_path / "from-ranks", **options)
    assert tree(tmp_path / "from-ranks") == tree(quantized)
    other = reshard.convert(quantized, tmp_path / "three", tp_size=3, sync=False)
    assert other.derived == made.derived
    options["tp_size"] = 3
    assert other.rank_files == reshard.convert(origin("dense"), tmp_path / "at-once", **options).rank_files


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"quantized": "nf3"}, VersionError, "is quantized to nf3"),
        ({"dequantized": "fp8"}, IntegrityError, "either quantized or dequantized"),
        ({"quantized": None}, IntegrityError, "either quantized or dequantized"),
        ({"experts": 1}, IntegrityError, "experts is true or false"),
        ({"dtype": "int4"}, IntegrityError, "unknown 'int4'"),
        ({"files": [{"file": 3, "size": 1, "digest": ""}]}, IntegrityError, "malformed"),
    ],
)
def test_what_a_manifest_claims_of_it_is_checked(
    changed: dict[str, Any], error: type[Exception], words: str, quantized: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(quantized, tmp_path / "out")
    reseal(folder, lambda content: content["derived"].update(changed))
    with pytest.raises(error, match=words):
        reshard.inspect(folder)


def test_there_is_a_recipe_for_each_kind() -> None:
    assert tuple(RECIPES) == QUANTIZATIONS


def test_a_weight_that_is_made_of_several_tensors_is_refused(
    checkpoint: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers quantizes what a conversion has made, which no tensor of the checkpoint is."""
    real = Naming.target

    def target(self: Naming, name: str) -> tuple[str | None, str | None]:
        found, conversion = real(self, name)
        return found, "up_proj" if name.endswith("up_proj.weight") else conversion

    monkeypatch.setattr(Naming, "target", target)
    with pytest.raises(BadInputError, match=r"mlp\.up_proj: its weight is made of other tensors") as refusal:
        reshard.convert(checkpoint("llama"), out, tp_size=2, quantize="nf4")
    assert "llm_int8_skip_modules" in str(refusal.value.hint)


@pytest.mark.parametrize("case", ["int8", "nested"])
def test_from_the_hub(case: str, here: FakeHub, origin: Any, tmp_path: Path) -> None:
    """Files come while they are cut, or all before if a pass over them comes first."""
    here.create("org/model", {path.name: path.read_bytes() for path in origin("dense").iterdir()})
    kind, options = CONFIGS[case]
    made = reshard.convert("org/model", tmp_path / "out", tp_size=3, quantize=kind, quantize_config=options)
    again = reshard.convert(origin("dense"), tmp_path / "again", tp_size=3, quantize=kind, quantize_config=options)
    assert (made.rank_files, made.source_files, made.derived) == (again.rank_files, again.source_files, again.derived)
    planned = reshard.plan("org/model", tp_size=3, quantize=kind, quantize_config=options)
    assert [bundle.target.name for bundle in planned.bundles] == [bundle.target.name for bundle in made.bundles]


def test_inspect_and_the_schema_know_of_it(quantized: Path, cli: Cli) -> None:
    assert "its weights were quantized to nf4 when it was made" in cli("inspect", quantized).out
    schema = json.loads((files("reshard") / "manifest.schema.json").read_text())
    content = json.loads((quantized / "reshard.json").read_text())
    Draft202012Validator(schema).validate(content)
    assert "derived" in content["requires"]
    names = [file["file"] for file in content["derived"]["files"]]
    assert names == [file["file"] for file in content["source"]["files"]]


def test_experts_over_ranks(origin: Any, single: Single, tmp_path: Path) -> None:
    kind, options = CONFIGS["fp8"]
    out = tmp_path / "out"
    reshard.convert(origin("experts"), out, tp_size=2, ep_size=2, quantize=kind, quantize_config=options, sync=False)
    reshard.merge(out, tmp_path / "merged", layout="hf", sync=False)
    found, (expected, _) = tensors_of(tmp_path / "merged"), single("experts", "fp8")
    assert found.keys() == expected.keys()
    assert not [name for name, one in expected.items() if not same(one, found[name])]


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_matrices_are_quantized_in_the_dtype_of_the_model(
    dtype: str | None, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The source is in fp32: that of the model is what config.json says, or --dtype."""
    source = shutil.copytree(checkpoint("llama", hidden_size=64, intermediate_size=128), tmp_path / "source")
    configure(source, dtype="bfloat16")
    reshard.convert(source, tmp_path / "out", tp_size=2, dtype=dtype, quantize="nf4", sync=False)
    reshard.merge(tmp_path / "out", tmp_path / "merged", layout="hf", sync=False)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=dtype or "auto")
    model.save_pretrained(tmp_path / "single")
    found, expected = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "single")
    assert found.keys() == expected.keys()
    kept = [name for name in expected if name.endswith("weight") and f"{name}.absmax" not in expected]
    assert {found[name].dtype for name in kept} == {torch.float16 if dtype else torch.float32}
    assert not [name for name, one in expected.items() if not same(one, found[name].to(one.dtype))]
    assert config_of(tmp_path / "merged") == config_of(tmp_path / "single")


def test_it_is_compared_with_its_source(origin: Any, quantized: Path, tmp_path: Path) -> None:
    assert reshard.verify(quantized, against=origin("dense")).elements
    reshard.convert(origin("dense"), tmp_path / "out", tp_size=3, quantize="int8", sync=False)
    other = shutil.copytree(origin("dense"), tmp_path / "other")
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite(file_of(other, name), lambda tensors: tensors[name][0].mul_(2))
    with pytest.raises(IntegrityError, match=r"down_proj\.(weight|SCB) differs from the source"):
        reshard.verify(tmp_path / "out", against=other)


def test_merge_says_what_cannot_be_undone(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="quantized to nf4, which loses bits") as refusal:
        reshard.merge(quantized, tmp_path / "merged")
    assert "--layout hf" in str(refusal.value.hint)


DEQUANTISED = [
    *(("even", kind) for kind in ("nf4_nested", "fp4_bf16", "int8", "ct_w4_zero", "ct_nvfp4", "gptq_order", "awq")),
    *(("ragged", kind) for kind in ("fp8", "fp8_e8m0", "nf4", "fbgemm")),
    *(("experts", kind) for kind in ("fp8", "ct_w4", "torchao_int8")),
    ("gpt_oss", "mxfp4"),
]


@pytest.mark.parametrize(("model", "kind"), DEQUANTISED)
def test_dequantising_stores_the_values_of_one_process(model: str, kind: str, tmp_path: Path) -> None:
    """Those that ranks make of the same files, which are compared with each library's in `test_formats`."""
    source = quantized_cases.quantized(quantized_cases.plain(model, tmp_path / "plain"), tmp_path / "source", kind)
    reshard.convert(source, tmp_path / "quantized", tp_size=2, sync=False)
    for number, origin in enumerate((source, tmp_path / "quantized")):
        out = tmp_path / f"out-{number}"
        made = reshard.convert(origin, out, tp_size=3, dequantize=True, dtype="bfloat16", sync=False)
        assert not made.bundles
        reshard.merge(out, tmp_path / f"merged-{number}", layout="hf", sync=False)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"merged-{number}")
        assert loaded.dtype == torch.bfloat16
        expected = dequantised_tensors(open_source(source), loaded, torch.bfloat16)
        found = tensors_of(tmp_path / f"merged-{number}")
        assert found.keys() == expected.keys()
        assert not [name for name, one in expected.items() if not same(one.to(torch.bfloat16), found[name])]
        with pytest.raises(BadInputError, match="dequantised from"):
            reshard.merge(out, tmp_path / "back")


@pytest.mark.parametrize("case", ["nf4", "nested", "fp4", "int8"])
def test_dequantised_weights_are_those_of_transformers(case: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Rows are whole blocks: for others, bitsandbytes 0.50.2 takes wrong scales on a CPU."""
    kind, options = CONFIGS[case]
    out, merged = tmp_path / "out", tmp_path / "merged"
    source = checkpoint("llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=192)
    reshard.convert(source, out, tp_size=2, quantize=kind, quantize_config=options, sync=False)
    reshard.convert(out, tmp_path / "plain", tp_size=2, dequantize=True, sync=False)
    reshard.merge(tmp_path / "plain", merged, layout="hf", sync=False)
    reshard.merge(out, tmp_path / "hf", layout="hf", sync=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dequantize()
    found = tensors_of(merged)
    wanted = {name: one.to(torch.bfloat16) for name, one in model.state_dict().items()}
    assert found.keys() == wanted.keys()
    assert not [name for name, one in wanted.items() if not same(one, found[name])]


def test_experts_are_quantized_if_asked(origin: Any, tmp_path: Path, cli: Cli) -> None:
    left = cli("plan", origin("experts"), "-tp", 2, "--quantize", "nf4").out
    assert "% of the weights in matrices are not quantized, as in transformers" in left
    said = cli("plan", origin("experts"), "-tp", 2, "--quantize", "nf4", "--experts").out
    assert "the experts are quantized too, which transformers does not" in said
    out = tmp_path / "out"
    made = reshard.convert(origin("experts"), out, tp_size=3, quantize="nf4", quantize_experts=True, sync=False)
    assert {bundle.target.name.rpartition(".")[2] for bundle in made.bundles} >= {"gate_up_proj", "down_proj"}
    reshard.verify(out, against=origin("experts"))


def test_a_plan_has_bits_and_bytes(origin: Any, tmp_path: Path) -> None:
    planned = reshard.plan(origin("dense"), tp_size=2, quantize="nf4", quantize_config=NESTED)
    made = reshard.convert(
        origin("dense"), tmp_path / "out", tp_size=2, quantize="nf4", quantize_config=NESTED, sync=False
    )
    report = planned.to_dict()
    sizes = zip(report["rank_bytes"], (record.size for record in made.rank_files), strict=True)
    assert all(abs(planned_size - size) < 64 * len(made.bundles) for planned_size, size in sizes)
    rows = {row["parameter"]: row for row in report["parameters"]}
    assert rows["model.layers.*.mlp.up_proj.weight"]["quantized"]["format"] == "bitsandbytes_4bit"
    assert reshard.plan(origin("dense"), gpu_memory=10**9, quantize="fp4").world_size == 1


def test_matrices_of_no_whole_blocks_are_left_and_listed(origin: Any, tmp_path: Path) -> None:
    """As Fp8Quantize leaves them; the configuration lists their modules beside those left by default."""
    said: list[str] = []
    options: dict[str, Any] = {"quantize": "fp8", "quantize_config": {"weight_block_size": [96, 32]}}
    reshard.convert(origin("dense"), tmp_path / "out", tp_size=2, sync=False, say=said.append, **options)
    assert any("4 modules are not quantized (a side is no whole blocks" in line for line in said)
    left = config_of(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    assert left == ["lm_head", *(f"model.layers.{n}.mlp.{name}" for n in range(2) for name in ("gate_proj", "up_proj"))]
    reshard.verify(tmp_path / "out", against=origin("dense"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantize": "nf4", "quantize_config": {"bnb_4bit_quant_type": "fp4"}}, "bnb_4bit_quant_type is fp4"),
        ({"quantize": "int8", "quantize_config": {"bits": 4}}, "bits is no option of BitsAndBytesConfig"),
        ({"quantize": "nf4", "quantize_config": {"bnb_4bit_compute_dtype": "fp7"}}, "fp7"),
        ({"quantize": "fp8", "quantize_config": {"activation_scheme": "static"}}, "activation_scheme static"),
        ({"quantize": "fp8", "quantize_experts": True}, "quantizes experts anyway"),
        ({"quantize": "nf4", "quantize_experts": True}, "this model has none"),
        ({"quantize": "q4_k_m"}, "quantize is 'q4_k_m'"),
        ({"quantize_experts": True}, "how to quantize"),
        ({"quantize": "nf4", "dequantize": True}, "contradict"),
        ({"quantize": "nf4", "drop_unused": True}, "--drop-unused"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str, source: Path, out: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        reshard.convert(source, out, tp_size=2, **options)
    assert words in f"{refusal.value} {refusal.value.hint}"
    assert not out.exists()


def test_a_name_of_no_module_is_said(source: Path) -> None:
    options = {"llm_int8_skip_modules": ["lm_head", "nosuch"]}
    plan = reshard.plan(source, tp_size=2, quantize="int8", quantize_config=options)
    assert "modules to leave out that the model has not: nosuch" in plan.notes


def test_what_is_quantized_is_not_quantized_again(checkpoint: Checkpoint, tmp_path: Path, refused: Refused) -> None:
    quantize_folder(checkpoint("llama"), tmp_path / "quantized", "ct_w8")
    where = [tmp_path / "quantized", tmp_path / "out", "-tp", 2]
    refused(3, ["convert", *where, "--quantize", "nf4"], "is quantized already", hint="--dequantize")
    refused(3, ["convert", checkpoint("llama"), *where[1:], "--dequantize"], "is not quantized", hint="leave out")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_what_transformers_keeps_in_fp32_is_stored_so(kind: str, tmp_path: Path) -> None:
    """The second linear layer of T5's MLP, of a checkpoint in fp16."""
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_heads=4, num_layers=1)
    folder = tmp_path / "source"
    transformers.T5ForConditionalGeneration(config).half().save_pretrained(folder)
    how = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    model = transformers.T5ForConditionalGeneration.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**how)
    )
    model.save_pretrained(tmp_path / "saved")
    reshard.convert(folder, tmp_path / "out", tp_size=2, quantize=kind, sync=False)
    reshard.merge(tmp_path / "out", tmp_path / "merged", layout="hf", sync=False)
    found, expected = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "saved")
    wo = [name for name in found if name.endswith("DenseReluDense.wo.weight")]
    assert wo
    assert {found[name].dtype for name in wo} == {torch.float32}
    assert found.keys() >= expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert same(tensor, found[name]), name

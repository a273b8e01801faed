"""Any number of ranks: heads and experts that do not divide are dealt unevenly, and every rank computes its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import transformers
from cli_tools import Checkpoint
from places import ROOT, WORKERS
from single_process import NEW_TOKENS, in_file
from torchrun_tools import on_ranks

import reshard
from reshard.sharding.placement import Nested, Ranges

IDS = torch.randint(3, 130, (2, 12), generator=torch.Generator().manual_seed(7))


def heads(query: int, key_value: int) -> dict[str, int]:
    return {"num_attention_heads": query, "num_key_value_heads": key_value}


# name → family, its options, and options of its conversion; a size of 0 stands for the number of ranks
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "nine over three": ("llama", {**heads(9, 3), "hidden_size": 36}, {}),
    "many for each": ("llama", {**heads(14, 2), "hidden_size": 56}, {}),
    "biased": ("qwen2", {**heads(28, 4), "hidden_size": 56}, {}),
    "one KV head": ("llama", {**heads(7, 1), "hidden_size": 28}, {}),
    "fused": ("gpt_neox", {**heads(7, 7), "hidden_size": 56}, {}),
    "tied": ("gemma2", {**heads(10, 5), "hidden_size": 40}, {}),
    "experts": ("qwen3_moe", {**heads(7, 7), "hidden_size": 28, "num_experts": 7}, {"ep_size": 0}),
    "bf16": ("mistral", {**heads(9, 3), "hidden_size": 36, "dtype": torch.bfloat16}, {}),
}
SIZES = (3, 5, 7)


def single(folder: Path) -> dict[str, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(IDS).logits
    tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW_TOKENS, do_sample=False)
    found = {"logits": logits, "tokens": tokens.tolist(), "parameters": dict(model.state_dict())}
    if model.dtype == torch.bfloat16:
        with torch.inference_mode():
            found["exact"] = model.float()(IDS).logits
    return found


@pytest.fixture(scope="module")
def source(checkpoint: Checkpoint) -> Callable[[str], Path]:
    return lambda name: checkpoint(MODELS[name][0], **MODELS[name][1])


def converted(source: Callable[[str], Path], size: int, names: Iterable[str], root: Path) -> dict[str, Path]:
    for name in names:
        options = {option: value or size for option, value in MODELS[name][2].items()}
        reshard.convert(source(name), root / name, tp_size=size, sync=False, **options)
    return {name: root / name for name in names}


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"tp{size}")
def ranks(request: pytest.FixtureRequest, source: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The number of ranks, the folders, and the results of each model."""
    size = request.param
    root = tmp_path_factory.mktemp(f"tp{size}")
    folders = converted(source, size, MODELS, root)
    return size, folders, run(root, size, folders)


def run(root: Path, size: int, folders: dict[str, Path]) -> dict[str, Any]:
    jobs = [{"name": n, "folder": str(f), "ids": IDS.tolist(), "new_tokens": NEW_TOKENS} for n, f in folders.items()]
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = on_ranks(size, str(WORKERS / "parity.py"), str(root / "jobs.json"), str(root / "out.json"))
    assert done.returncode == 0, done.stderr
    results = json.loads((root / "out.json").read_text())
    return {name: {**result, **torch.load(root / f"out.json.{name}.pt")} for name, result in results.items()}


def assert_parity(got: dict[str, Any], expected: dict[str, Any]) -> None:
    scale = expected["logits"].abs().max()
    if "exact" in expected:  # rounding: at most twice as far as one process is from the same weights computed in fp32
        ours, theirs = got["logits"].float() - expected["exact"], expected["logits"].float() - expected["exact"]
        assert ours.abs().max() <= 2 * theirs.abs().max()
    else:
        assert (got["logits"] - expected["logits"]).abs().max() <= 1e-5 * scale
        assert got["tokens"] == expected["tokens"]
    assert got["parameters"].keys() == expected["parameters"].keys()
    for name, tensor in got["parameters"].items():
        assert torch.equal(tensor, expected["parameters"][name].to(tensor.dtype)), name


@pytest.fixture(scope="module")
def singles(source: Callable[[str], Path]) -> Callable[[str], dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {}
    return lambda name: made.get(name) or made.setdefault(name, single(source(name)))


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_one_process_does(name: str, ranks: Any, singles: Any) -> None:
    _, _, results = ranks
    assert_parity(results[name], singles(name))


@pytest.mark.parametrize("name", MODELS)
def test_the_folder_gives_the_source_back(name: str, ranks: Any, source: Any, tmp_path: Path) -> None:
    _, folders, _ = ranks
    reshard.verify(folders[name], against=source(name))
    reshard.merge(folders[name], tmp_path / "merged")
    for path in source(name).glob("*.safetensors"):
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", MODELS)
def test_from_any_number_to_any_other(name: str, ranks: Any, source: Any, tmp_path: Path) -> None:
    size, folders, _ = ranks
    other = SIZES[SIZES.index(size) - 1]
    (direct,) = converted(source, other, [name], tmp_path).values()
    options = {option: value or other for option, value in MODELS[name][2].items()}
    reshard.convert(folders[name], tmp_path / "again", tp_size=other, **options)
    for path in direct.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_only_what_torch_has_no_word_for_stays_local(ranks: Any) -> None:
    """Uneven parameters are local tensors, all others DTensors. The manifest says that transformers cannot open it."""
    _, folders, results = ranks
    for name, folder in folders.items():
        manifest = reshard.inspect(folder)
        uneven = [
            target.name
            for target in manifest.parameters
            if isinstance(target.placement, Ranges)
            or (isinstance(target.placement, Nested) and isinstance(target.placement.outer, Ranges))
        ]
        plain = set(results[name]["plain"]) - {n for n in results[name]["plain"] if n.endswith("gate_up_proj")}
        assert plain <= set(uneven) <= set(results[name]["plain"])
        assert bool(uneven) <= bool(manifest.runtime_only)


@pytest.mark.parametrize(("tp", "ep"), [(3, 6), (6, 3), (2, 6), (6, 2)])
def test_heads_and_experts_over_other_ranks(tp: int, ep: int, tmp_path: Path) -> None:
    """Rows of ranks share 7 experts or 7 heads that do not divide, and cut the experts among them."""
    source = pico.save("qwen3_moe", tmp_path / "source", **heads(7, 7), hidden_size=28, num_experts=7)
    reshard.convert(source, tmp_path / "out", tp_size=tp, ep_size=ep, sync=False)
    reshard.verify(tmp_path / "out", against=source)
    assert_parity(run(tmp_path, 6, {"moe": tmp_path / "out"})["moe"], single(source))


def check(root: Path, size: int, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    base = {"source": None, "per_layer": True, "where": None, "load": {}}
    (root / "jobs.json").write_text(json.dumps([base | job for job in jobs]))
    done = on_ranks(size, str(WORKERS / "checking.py"), str(root / "jobs.json"), str(root / "out.json"))
    assert done.returncode == 0, done.stderr
    return json.loads((root / "out.json").read_text())


def test_check_layer_by_layer_with_everything_else(source: Callable[[str], Path], tmp_path: Path) -> None:
    """`check --per-layer` of uneven ranks: sound, with a split sequence, as replicas, and with a wrong head."""
    names = ["nine over three", "experts"]
    folders = converted(source, 4, names, tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(folders["nine over three"], damaged)
    values = "model.layers.1.self_attn.v_proj"
    in_file(1, f"{values}.weight", lambda tensor: tensor * 1.01)(damaged)
    jobs = [{"name": name, "folder": str(folder), "source": str(source(name))} for name, folder in folders.items()]
    jobs += [{**job, "name": f"{job['name']} split", "load": {"sequence_parallel": True}} for job in jobs]
    jobs.append({"name": "damaged", "folder": str(damaged), "source": str(source("nine over three"))})
    found = check(tmp_path, 4, jobs)
    twice = check(tmp_path, 8, [{**jobs[0], "load": {"dp_size": 2}}])
    for name, parity in {**found, "twice": twice[names[0]]}.items():
        assert parity["ok"] == (name != "damaged"), (name, parity)
        assert (parity["difference"] is None) == (name != "damaged"), (name, parity)
    assert found["damaged"]["difference"]["module"] == values
    assert found["damaged"]["difference"]["ranks"] == [1]


def test_every_size_of_a_llama(tmp_path: Path) -> None:
    """All sizes from 1 to the number of query heads are legal, and no other."""
    source = pico.save("llama", tmp_path / "source", **heads(32, 8), hidden_size=64)
    plan = reshard.plan(source, tp_size=1).to_dict()
    assert [int(size) for size, why in plan["tp_sizes"].items() if why is None] == list(range(1, 33))
    assert "32 query heads" in plan["tp_sizes"]["33"]


@pytest.mark.slow
def test_every_size_of_a_llama_runs(tmp_path: Path) -> None:
    source = pico.save("llama", tmp_path / "source", **heads(32, 8), hidden_size=64, num_hidden_layers=1)
    expected = single(source)
    for size in range(1, 33):
        root = tmp_path / f"tp{size}"
        reshard.convert(source, root / "out", tp_size=size, sync=False)
        assert_parity(run(root, size, {"llama": root / "out"})["llama"], expected)


@pytest.mark.slow
def test_a_real_model(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct in fp32, whose 9 query heads and 3 KV heads divide by none of these but 3."""
    pytest.importorskip("gguf", reason="pip install 'reshard[real]'")
    source = tmp_path / "source"
    subprocess.run([sys.executable, ROOT / "scripts" / "make_smollm2.py", source, "float32"], check=True)
    expected = single(source)
    for size in (2, 3, 4, 5):
        root = tmp_path / f"tp{size}"
        reshard.convert(source, root / "out", tp_size=size, sync=False)
        assert_parity(run(root, size, {"smollm2": root / "out"})["smollm2"], expected)
        shutil.rmtree(root)

"""A folder of every format version stays readable: it was made once, by the release that wrote that version.

Its contents cover the format: several source files, fused experts (regions), packed blocks and a KV head that two
ranks share (placements), an unused tensor, and copied files; the folder of 3.0 also has a required feature. One more of
3.0 is quantized: nf4 with nested scales, whose states differ in length from expert to expert.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pico
import pytest
import torch
from cli_tools import INDEX, Cli, rewrite, weight_map
from golden import BUNDLES, FOLDERS, VERSIONS
from places import DATA, WORKERS
from quantizing import quantize_folder
from torchrun_tools import on_ranks

import reshard
from reshard.resharded.versions import CLOSED, FEATURES, OPEN
from reshard.sharding.placement import Nested, PackedShard, Ranges, Replicate, Shard

PARITY = WORKERS / "parity.py"
IDS = [[3, 14, 15, 9], [2, 6, 5, 20]]
NEW_TOKENS = 4


def make(folder: Path) -> None:
    """Make a golden folder, and the expected results beside it. Run once for each format version."""
    sizes = {"vocab_size": 21, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    experts = {"num_experts": 2, "moe_intermediate_size": 6, "num_key_value_heads": 1, "head_dim": 4}
    if quantized := folder.name.endswith(BUNDLES):
        sizes["hidden_size"] = 64
    source = folder.with_name("golden-source")
    pico.save("qwen3_moe", source, shard_bytes=4000, mlp_only_layers=[], **sizes, **experts)
    if quantized:
        source = quantize_folder(source, folder.with_name("golden-quantized"), "nf4_nested")
    (source / "LICENSE").write_text("do as you please\n")
    if OPEN in folder.name:
        (source / "additional_chat_templates").mkdir()
        (source / "additional_chat_templates" / "brief.jinja").write_text("{{ messages[0].content }}\n")
    last = max(source.glob("*.safetensors"))
    rewrite(last, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.ones(2)}))
    weight_map(source, lambda names: names.update({"model.rotary_emb.inv_freq": last.name}))
    reshard.convert(source, folder, tp_size=2)
    computed = compute(folder, folder.parent)
    expected = {
        "logits": computed["logits"].tolist(),
        "tokens": computed["tokens"],
        "sha256": digests(source),
    }
    folder.with_suffix(f"{folder.suffix}.json").write_text(json.dumps(expected, indent=1) + "\n")


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file but the index: merging writes another index with the same content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != INDEX)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def compute(folder: Path, scratch: Path) -> dict:
    """Return logits and greedy tokens of the folder, on two processes."""
    jobs, out = scratch / "jobs.json", scratch / "out.json"
    jobs.write_text(json.dumps([{"name": "golden", "folder": str(folder), "ids": IDS, "new_tokens": NEW_TOKENS}]))
    done = on_ranks(2, str(PARITY), str(jobs), str(out))
    assert done.returncode == 0, done.stderr
    return {**torch.load(f"{out}.golden.pt"), "tokens": json.loads(out.read_text())["golden"]["tokens"]}


@pytest.fixture(params=FOLDERS)
def golden(request: pytest.FixtureRequest) -> Path:
    return DATA / f"golden-{request.param}"


def expected(golden: Path) -> dict:
    return json.loads((DATA / f"{golden.name}.json").read_text())


def test_the_current_version_has_one() -> None:
    assert [CLOSED, *([OPEN] if FEATURES else [])] == VERSIONS


@pytest.mark.fault(23)
def test_inspect(golden: Path, cli: Cli) -> None:
    result = cli("inspect", golden, "--format", "json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["world_size"] == 2
    manifest = reshard.inspect(golden)
    of_model = [*manifest.parameters, *(bundle.target for bundle in manifest.bundles)]
    in_pairs = Ranges if BUNDLES in golden.name else PackedShard  # fused gate and up, cut on units there
    assert {type(target.placement) for target in of_model} == {Shard, Replicate, in_pairs, Nested}
    lengths = [member.lengths for bundle in manifest.bundles for member in bundle.quantized.members.values()]
    assert any(len(set(of)) > 1 for of in lengths) == (BUNDLES in golden.name)
    assert manifest.unused_file is not None
    assert max(len(target.regions) for target in manifest.parameters) > 1


@pytest.mark.fault(23)
def test_verify(golden: Path, cli: Cli) -> None:
    assert cli("verify", golden).code == 0


@pytest.mark.fault(23)
def test_merge_gives_the_original_files(golden: Path, tmp_path: Path) -> None:
    reshard.merge(golden, tmp_path / "merged")
    assert digests(tmp_path / "merged") == expected(golden)["sha256"]


@pytest.mark.fault(23)
def test_load_computes_what_it_did(golden: Path, tmp_path: Path) -> None:
    got, wanted = compute(golden, tmp_path), expected(golden)
    logits = torch.tensor(wanted["logits"])
    assert (got["logits"] - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert got["tokens"] == wanted["tokens"]

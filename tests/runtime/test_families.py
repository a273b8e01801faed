"""Every family of model that transformers can shard: resharded, it computes what one process does.

CI runs a sample that uses every style and every conversion; `scripts/families --write` runs all families on all
meshes and writes the table that is checked here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import families
import family_report
import matrix
import pytest
import torch
import transformers
from places import ROOT
from safetensors.torch import load_file
from transformers import conversion_mapping

import reshard
from reshard.planning.model.corrections import CORRECTIONS

SAMPLE = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "glm4", "gpt_oss", "deepseek_v2"),
    *("deepseek_v3", "qwen3_moe", "mixtral", "qwen3_next", "longcat_flash", "mimo_v2_flash", "falcon_h1"),
    *("llava", "qwen2_5_vl", "gemma3", "mistral3", "llama4", "aria", "t5gemma2"),
    "higgs_audio_v2",  # its generate admits only some processors of logits
    # upstream is wrong, or refuses
    *("hrm_text", "step3p7", "qwen3_vl_moe", "inkling2", "inkling_text", "ernie4_5_vl_moe", "minimax_m3_vl"),
    *("doge", "esmc", "gemma3n_text", "neomme", "glm5_next_text", "diffusion_gemma"),
    *("dory", "inkling2_loop_text", "sarvam_moe"),  # conversions new in 5.24
    *("granitemoeshared", "nemo_speechlm"),  # parts that the model's plan leaves out
)
# Of families without a plan: heads told in each way, fused projections of each layout, Conv1D, experts, recurrent
# layers, convolutions, biases of heads, encoders, and an encoder with a decoder.
UNPLANNED = (
    *("opt", "gpt2", "bloom", "falcon", "stablelm", "persimmon", "gpt_bigcode", "mpt", "t5", "bart", "bert", "jetmoe"),
    *("mamba", "rwkv", "zaya", "openai_privacy_filter", "clip_vision_model", "squeezebert", "whisper"),
)
# Families without a plan that cannot be run on ranks, and why.
UNRUN = {"big_bird": "it replaces its attention while it runs, and a loaded model keeps its modules"}
# Nothing of these can be cut.
UNCUT: set[str] = set()
# Reasons why a family is not in the walk, other than a missing package.
UNBUILT = {
    "diffusion_gemma": "its configuration has no vision part by default (5.17)",
    "apertus1p5": "no small configuration of it is known",
    "esmfold2": "no small configuration of it is known",
    "gemma4_assistant": "drafts for another model, from that one's cache",
    "gemma4_unified_assistant": "as gemma4_assistant",
    "granite4_vision": "its default configuration is of another text model (5.17)",
    "hy_v4_vl": "no small configuration of it is known",
    "llama4": "its wrapper fails in one process (5.24)",
    "omniasr": "no small configuration of it is known",
    "qwen2_5_omni": "wants a file of voices beside the weights",
    "qwen3_omni_moe": "has no forward: its thinker and talker are in the walk",
}
# Families that some number of ranks of the walk is refused for, and why.
REFUSED = {"codegen": "its heads stand in 4 blocks, so 4 ranks are its most"}
TABLES = sorted(path.stem.removeprefix("families-") for path in family_report.DATA.glob("families-*.jsonl"))
NEWEST = TABLES[-1]


def broken(rows: list[matrix.Row]) -> list[matrix.Row]:
    return [row for row in rows if row.step in ("convert", "run", "parity") and not row.ok]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process does with each family, for all meshes: their walks fill it."""
    return {}


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (3, 1), (2, 2)])  # test_parity has pico models on 4 ranks
def test_sample(tp: int, ep: int, alone: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    rows = matrix.walk(tmp_path_factory.mktemp(f"tp{tp}-ep{ep}"), tp, ep, SAMPLE, alone=alone)
    assert broken(rows) == []
    assert sum(row.ok for row in rows) >= (10 if ep > 1 else 30)


@pytest.mark.parametrize("tp", [2, 3])
def test_sample_without_a_plan(tp: int, alone: dict[str, Any], tmp_path: Path) -> None:
    rows = matrix.walk(tmp_path, tp, 1, UNPLANNED, planned=False, alone=alone)
    assert broken(rows) == []
    assert {row.family for row in rows if row.ok} == set(UNPLANNED)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [tp for tp, _ in family_report.UNPLANNED_MESHES])
def test_every_family_without_a_plan(tp: int, tmp_path: Path) -> None:
    rows = matrix.walk(tmp_path, tp, 1, planned=False)
    assert {row.family for row in broken(rows)} <= UNRUN.keys()
    assert sum(row.ok for row in rows) >= 200


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "ep"), family_report.MESHES)
def test_every_family(tp: int, ep: int, tmp_path: Path) -> None:
    rows = matrix.walk(tmp_path, tp, ep)
    assert broken(rows) == []
    assert sum(row.ok for row in rows) >= (80 if ep > 1 else 190)


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Return the written table of one release of transformers."""
    return family_report.read(request.param)


def test_there_is_a_table_of_both_ends() -> None:
    assert TABLES == ["5.17", "5.24"]


def test_every_family_of_the_table_is_exact_or_explained(table: list[dict[str, Any]]) -> None:
    unexplained = []
    for record in table:
        lacks = re.search(r"requires the \w+ library|does not export", record["reason"])
        if not family_report.is_exact(record) and not lacks and record["family"] not in UNBUILT:
            unexplained.append(record)
    assert unexplained == []


def test_every_family_without_a_plan_is_exact_or_explained() -> None:
    """None is refused: a plan of ours fits all numbers of ranks of the walk."""
    records = family_report.read(NEWEST, "unplanned")
    wrong = {record["family"] for record in records if record["meshes"] and not family_report.is_exact(record)}
    assert wrong == UNRUN.keys()
    assert not [record for record in records if any("refused" in result for result in record["meshes"].values())]
    assert all(record["reason"] for record in records if not record["meshes"])
    assert {record["plan"] for record in records if record["meshes"]} <= {"ours", "general", "none"}
    assert {record["family"] for record in records if record["plan"] == "none"} == UNCUT


def test_every_number_of_ranks_but_for_known_reasons() -> None:
    """Families with a plan ran at tp 2, 3, 4 and 5. 3 and 5 divide hardly any number of heads here."""
    refused = set()
    for record in family_report.read(NEWEST):
        ran = {mesh for mesh in record["meshes"] if "ep" not in mesh}
        assert ran in (set(), {"tp2", "tp3", "tp4", "tp5"}), record["family"]
        refused |= {record["family"] for result in record["meshes"].values() if "refused" in result}
    assert refused == REFUSED.keys()


def test_the_sample_uses_every_style_and_every_conversion() -> None:
    def used(records: list[dict[str, Any]]) -> set[str]:
        return {name for record in records for name in (*record["styles"], *record["conversions"])}

    everything = family_report.read(NEWEST)
    assert used([record for record in everything if record["family"] in SAMPLE]) == used(everything)


@pytest.mark.skipif("molmo2_text" not in families.MODEL_TYPES, reason="not in this transformers")
def test_a_conversion_of_a_family_without_a_plan(tmp_path: Path) -> None:
    """Molmo2 splits fused projections, on one rank."""
    config = families.small_config("molmo2_text")
    model = transformers.AutoModel.from_config(config)
    reshard.convert(families.save(model, tmp_path / "source"), tmp_path / "out", tp_size=1)
    stored = load_file(tmp_path / "out" / "shard-00001-model-00001-of-00001.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name], tensor), name


def test_the_walk_runs_every_conversion() -> None:
    registered = {
        type(operation).__name__
        for entries in conversion_mapping._build_checkpoint_conversion_mapping().values()
        for entry in entries
        for operation in getattr(entry, "operations", ())
    }
    assert registered <= {name for record in family_report.read(NEWEST) for name in record["conversions"]}


def test_plans_put_right_are_wrong_upstream() -> None:
    """A correction that no supported release needs would only cost speed."""
    wrong = set()
    for record in (record for version in TABLES for record in family_report.read(version)):
        error = record.get("upstream", 0.0)
        if isinstance(error, str) or error > matrix.EXACT:
            wrong |= {record["family"], f"{record['family']}_text"}
    assert set(CORRECTIONS) <= wrong


def test_the_pages_say_what_the_tables_say() -> None:
    page = " ".join((ROOT / "scripts" / "README.md").read_text().split())
    unplanned = family_report.read(NEWEST, "unplanned")
    exact, built = sum(map(family_report.is_exact, unplanned)), sum(bool(r["meshes"]) for r in unplanned)
    ours = sum(record["plan"] == "ours" for record in unplanned)
    assert f"{exact} of the {built} families without a plan" in page
    assert f"{ours} by structure" in page
    assert f"{exact} families more" in (ROOT / "README.md").read_text()
    for version in TABLES:
        records = family_report.read(version)
        exact, built = sum(map(family_report.is_exact, records)), sum(bool(r["meshes"]) for r in records)
        assert f"{exact} of the {built} families" in page, version
        if version == NEWEST:
            assert f"{exact} of the {built} families" in (ROOT / "README.md").read_text()

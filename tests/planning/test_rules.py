"""Rules of a plan: where they come from, what they match, and refusals of rules that match nothing or too much."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from reshard.errors import BadInputError
from reshard.planning.model.rules import AUTO, Rules, expand, expert_rules, model_rules, read_rules


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(2, 4)
        self.down_proj = nn.Linear(4, 2)
        self.experts = Experts()


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 2))
        self.down_proj = nn.Parameter(torch.zeros(4, 2, 4))
        self.inner = nn.Linear(2, 2)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.embed = nn.Embedding(4, 2)


TP_PLAN = {"text.layers.*.up_proj": "colwise", "head": "colwise_gather_output", "gone.*": "rowwise"}
EP_PLAN = {"text.layers.*.experts": "ep_dispatch_experts", "text.layers.*.experts.gate_up_proj": "grouped_gemm"}


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text = Tower()
        self.vision = Tower()
        self.head = nn.Linear(2, 4)
        self.conv = Conv1D(4, 2)
        self.tp_plan, self._ep_plan = TP_PLAN, EP_PLAN
        self.config = SimpleNamespace(model_type="toy")


@pytest.fixture
def model() -> Any:
    return Toy()


def test_auto_is_the_models_own(model: Any) -> None:
    assert model_rules(model, AUTO) == Rules(TP_PLAN)


def test_rules_replace_the_models_own_unless_they_extend_them(model: Any) -> None:
    rules = {"head": "replicate", "text.embed": "rowwise"}
    assert model_rules(model, rules) == Rules(rules, frozenset(rules))
    assert model_rules(model, {"extends": "auto", **rules}) == Rules({**TP_PLAN, **rules}, frozenset(rules))


def test_what_stands_before_may_be_left_out_where_it_is_clear(model: Any) -> None:
    found = model_rules(model, {"text.layers.*.up_proj": "colwise", "head.weight": "colwise"})
    assert set(found.styles) == {"text.layers.*.up_proj", "head.weight"}
    with pytest.raises(BadInputError, match=r"layers\.\*\.up_proj is ambiguous") as caught:
        model_rules(model, {"layers.*.up_proj": "colwise"})
    assert caught.value.hint == "write one of: text.layers.*.up_proj, vision.layers.*.up_proj"


@pytest.mark.parametrize(
    ("pattern", "candidate"),
    [
        ("text.layers.*.up_porj", "text.layers.*.up_proj"),
        ("text.layers.0.up_proj", "text.layers.*.up_proj"),  # `*` is every layer; a single layer cannot be named
        ("model.layers.*.mlp.up_proj", "vision.layers.*.up_proj"),
    ],
)
def test_a_rule_that_matches_nothing_lists_candidates(model: Any, pattern: str, candidate: str) -> None:
    with pytest.raises(BadInputError, match="matches nothing") as caught:
        model_rules(model, {"extends": "auto", pattern: "colwise"})
    assert candidate in (caught.value.hint or "")


def test_two_rules_for_one_name_are_refused(model: Any) -> None:
    rules = {"text.layers.*.up_proj": "colwise", "layers.*.up_proj": "rowwise"}
    del model.vision  # so that the second rule is unambiguous, and matches the same names
    with pytest.raises(BadInputError, match=r"two rules are for text\.layers\.\*\.up_proj"):
        model_rules(model, rules)


def test_rules_that_cannot_be_right_are_put_right_and_told(model: Any) -> None:
    model.config.model_type = "gemma3n_text"
    model.tp_plan = {"layers.*.mlp.gate_proj": "colwise", "layers.*.mlp.down_proj": "rowwise", "head": "colwise"}
    found = model_rules(model, AUTO)
    assert found.styles["layers.*.mlp.gate_proj"] == "colwise_gather_output"
    assert found.styles["head"] == "colwise"
    assert found.corrected == ("layers.*.mlp.gate_proj", "layers.*.mlp.down_proj")
    assert model_rules(model, {"head": "colwise"}).corrected == ()
    assert model_rules(model, {"extends": "auto", "head": "rowwise"}).corrected == found.corrected


@pytest.mark.parametrize("plan", ["manual", {"extends": "mine", "head": "colwise"}])
def test_there_is_one_base(model: Any, plan: Any) -> None:
    with pytest.raises(BadInputError):
        model_rules(model, plan)


def test_a_modules_rule_is_its_parameters_and_their_own_comes_first(model: Any) -> None:
    rules = {"text.layers.*.up_proj": "colwise", "text.layers.*.up_proj.bias": "replicate", "nothing": "rowwise"}
    found = expand(model, rules, {})
    assert found.modules == {f"text.layers.{i}.up_proj": "colwise" for i in (0, 1)}
    assert found.parameters["text.layers.1.up_proj.weight"] == "colwise"
    assert found.parameters["text.layers.1.up_proj.bias"] == "replicate"
    assert "text.layers.0.down_proj.weight" not in found.parameters
    assert found.unused == ("nothing",)


def test_a_style_is_that_of_the_kind_of_layer(model: Any) -> None:
    found = expand(model, {"text.embed": "rowwise", "vision.embed": "local_colwise", "conv": "rowwise_rep"}, {})
    assert found.modules == {
        "text.embed": "embedding_rowwise",
        "vision.embed": "embedding_local_colwise",
        "conv": "conv1d_rowwise_split_input",
    }
    assert found.parameters["conv.bias"] == "conv1d_rowwise_split_input"


def test_expert_rules_come_before_the_others(model: Any) -> None:
    rules = {
        "text.layers.*.experts": "moe_tp_experts",
        "text.layers.*.experts.gate_up_proj": "packed_colwise",
        "text.layers.*.experts.inner": "colwise",
        "text.layers.*.up_proj": "colwise",
    }
    found = expand(model, rules, EP_PLAN)
    assert found.modules["text.layers.0.experts"] == "ep_dispatch_experts"
    assert "text.layers.0.experts.inner" not in found.modules
    assert "text.layers.0.experts.inner.weight" not in found.parameters
    assert found.experts == {f"text.layers.{i}.experts.gate_up_proj": "grouped_gemm" for i in (0, 1)}
    assert found.parameters["text.layers.0.experts.gate_up_proj"] == "packed_colwise"  # for ranks that share experts
    assert found.modules["text.layers.0.up_proj"] == "colwise"
    assert found.unused == ()


def test_the_routers_rule_of_older_releases_is_the_experts(model: Any) -> None:
    model._ep_plan = {
        "gate": "ep_router",
        "mlp.up": "colwise",
        "experts": "moe_tp_experts",
        "experts.up": "grouped_gemm",
    }
    assert expert_rules(model) == {"experts": "ep_dispatch_experts", "experts.up": "grouped_gemm"}
    model._ep_plan = None
    assert expert_rules(model) == {}


def test_files(tmp_path: Path) -> None:
    rules = {"extends": "auto", "layers.*.up_proj": "packed_colwise[4,1,1]"}
    (tmp_path / "p.json").write_text(json.dumps(rules))
    (tmp_path / "p.toml").write_text('extends = "auto"\n"layers.*.up_proj" = "packed_colwise[4,1,1]"\n')
    assert read_rules(tmp_path / "p.json") == read_rules(str(tmp_path / "p.toml")) == rules


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.json", "{", "not valid JSON"),
        ("p.json", "[]", "holds no rules"),
        ("p.json", "{}", "holds no rules"),
        ("p.json", '{"a": 1}', "the style of a is not a name"),
        ("p.json", '{"a": "colwise", "a": "rowwise"}', "twice"),
        ("p.toml", "a = ", "not valid TOML"),
        ("p.toml", 'layers.up = "colwise"', "the style of layers is not a name"),
        ("p.toml", None, "cannot be read"),
        ("p.json", None, "cannot be read"),
        ("p.yaml", "a: colwise", "a plan is a .json or a .toml file"),
    ],
)
def test_files_that_are_no_plans(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInputError, match=words):
        read_rules(tmp_path / name)

"""Plans of ours for models without one: which weights can be cut where, what a trace proves, and what a plan
advises."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from reshard.planning.cuts import does_cut
from reshard.planning.model.rules import AUTO, GENERAL, expand, model_rules
from reshard.planning.unplanned.added import added_styles, by_pattern
from reshard.planning.unplanned.general import general_styles
from reshard.planning.unplanned.readers import leaf_forward, read_elsewhere
from reshard.planning.unplanned.structure import structured_styles
from reshard.strategies.registry import ALL_PARALLEL_STYLES

# There plans leave out embeddings, and experts are not traced: torch's kernel for them takes bf16 only.
OTHERWISE = pytest.mark.skipif(transformers.__version__.startswith("5.17"), reason="otherwise in transformers 5.17")


class Scaled(nn.Embedding):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.scale


class Places(nn.Embedding):
    def forward(self, length: int) -> torch.Tensor:
        positions = torch.arange(length, device=self.weight.device) + 2
        return super().forward(positions)


class Normed(nn.Embedding):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        found = super().forward(input_ids)
        return found / found.norm()


class Reader(nn.Module):
    """A module whose code reads weights of the modules in it, in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.by_getattr = (nn.Linear(32, 32) for _ in range(3))
        self.asked, self.trained, self.flagged, self.direct = (nn.Linear(32, 32) for _ in range(4))
        self.looped = nn.ModuleList([nn.Linear(32, 32)])
        self.slow = False

    def _init_weights(self) -> None:
        self.called.weight.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.called(x.to(self.asked.weight.dtype)) @ self.read.weight + getattr(self.by_getattr, "bias")  # noqa: B009
        if self.training and x.ndim == 2:
            x = x @ self.trained.weight
        if self.slow:
            x = x @ self.flagged.weight
        for layer in self.looped:
            x = x @ layer.weight
        return self.direct.forward(self.asked(self.flagged(self.trained(x))))


class Mixed(nn.Module):
    """Modules of every kind that the general plan knows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.few = nn.Linear(16, 32), nn.Linear(16, 2)
        self.conv, self.grouped = nn.Conv2d(3, 32, 2), nn.Conv1d(32, 32, 3, groups=4)
        self.transposed = nn.ConvTranspose1d(16, 32, 2)
        self.embedding, self.bounded = nn.Embedding(8, 32), nn.Embedding(8, 32, max_norm=1.0)
        self.weighted = weight_norm(nn.Linear(16, 32))
        self.attention = nn.MultiheadAttention(32, 4)
        self.norm = nn.LayerNorm(32)


def on_meta(model_type: str) -> Any:
    config = families.small_config(model_type)
    with torch.device("meta"):
        return families._model_class(config)._from_config(config)


def structured(model: Any) -> dict[str, str]:
    styles, why = structured_styles(model, {name for name, _ in model.named_modules()})
    assert why is None
    return styles


def test_which_weights_are_read_elsewhere() -> None:
    assert read_elsewhere(nn.ModuleDict({"in": Reader()})) == {"in.read", "in.by_getattr", "in.direct", "in.looped.0"}


def test_a_flag_that_is_set_reads() -> None:
    model = Reader()
    model.slow = True
    assert "flagged" in read_elsewhere(model)


def test_forwards_of_embeddings() -> None:
    kinds = (nn.Embedding, Scaled, Places, Normed)
    assert [leaf_forward(kind(8, 32), nn.Embedding) for kind in kinds] == ["plain", "same", "other", None]


def test_general_styles_of_every_kind_of_module() -> None:
    assert general_styles(Mixed()) == {
        "linear": "colwise_gather_output",
        "conv": "conv_colwise_gather_output",
        "transposed": "conv_transposed_colwise_gather_output",
        "embedding": "embedding_colwise",
    }


def test_modules_that_share_a_weight_are_cut_alike() -> None:
    model = on_meta("opt")
    assert model.all_tied_weights_keys
    styles = general_styles(model)
    assert styles["model.decoder.embed_tokens"] == "embedding_rowwise"
    assert styles["lm_head"] == "colwise_gather_output"


def test_a_head_that_shares_a_weight_which_is_read_stays_whole_with_it() -> None:
    model = on_meta("mobilebert")  # it joins the embedding's weight with another one
    assert "mobilebert.embeddings.word_embeddings" not in general_styles(model)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "opt",
            {
                **{f"model.decoder.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
                "model.decoder.layers.*.self_attn.out_proj": "rowwise",
                "model.decoder.layers.*.self_attn": "heads[8,8,num_heads]",
                "model.decoder.layers.*.fc1": "colwise",
                "model.decoder.layers.*.fc2": "rowwise",
            },
        ),
        (
            "gpt2",
            {
                "transformer.h.*.attn.c_attn": "packed_colwise[1,1,1]",
                "transformer.h.*.attn.c_proj": "rowwise",
                "transformer.h.*.attn": "heads[8,8,embed_dim,num_heads,split_size]",
                "transformer.h.*.mlp.c_fc": "colwise",
                "transformer.h.*.mlp.c_proj": "rowwise",
            },
        ),
        (  # every head's query, key and value stand together
            "persimmon",
            {
                "model.layers.*.self_attn.query_key_value": "colwise",
                "model.layers.*.self_attn.dense": "rowwise",
                "model.layers.*.self_attn": "heads[8,8,num_heads]",
                "model.layers.*.mlp.dense_h_to_4h": "colwise",
                "model.layers.*.mlp.dense_4h_to_h": "rowwise",
            },
        ),
        (  # biases of heads are added to their scores, so heads cannot be told apart in a whole tensor of them
            "bloom",
            {"transformer.h.*.mlp.dense_h_to_4h": "colwise", "transformer.h.*.mlp.dense_4h_to_h": "rowwise"},
        ),
        ("rwkv", {}),
    ],
)
def test_structure(family: str, expected: dict[str, str]) -> None:
    model = on_meta(family)
    assert by_pattern(model, structured(model)) == expected


@OTHERWISE
def test_structure_with_shared_position_biases_and_sinks() -> None:
    for family, pattern, style in (
        ("t5", "encoder.block.*.layer.*.SelfAttention.relative_attention_bias", "local_colwise"),
        ("t5", "decoder.block.*.layer.*.EncDecAttention", "heads[8,8,n_heads]"),
        ("gpt_oss", "model.layers.*.self_attn.sinks", "colwise"),
        ("stablelm", "model.layers.*.self_attn", "heads[8,2,kv:num_key_value_heads,num_heads]"),
    ):
        model = on_meta(family)
        found = by_pattern(model, structured(model))
        assert found[pattern] == style, family


class Block(nn.Module):
    """Two linear layers with something between, and maybe what needs all features."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.up, self.down, self.between = nn.Linear(32, 64), nn.Linear(64, 32), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.between(self.up(x)))


class Blocks(nn.Module):
    def __init__(self, between: Any) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(100, 32), Block(between)
        self.config = SimpleNamespace(model_type="toy")

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.block(self.embed(input_ids))


@pytest.mark.parametrize(
    ("between", "is_cut"),
    [
        (nn.GELU(), True),
        (lambda x: x.unflatten(-1, (-1, 16)).softmax(-1).flatten(-2), True),
        (lambda x: x.softmax(-1), False),
        (lambda x: x / x.norm(dim=-1, keepdim=True), False),
        (lambda x: x.flip(-1), False),
        (lambda x: x.roll(1, -1), False),
        (lambda x: x * torch.linspace(0, 1, 64), False),  # another factor for each feature
        (lambda x: x.view(*x.shape[:-1], 4, 16).transpose(-1, -2).flatten(-2), False),  # others stand side by side
        (lambda x: x / x.shape[-1], False),  # a rank has fewer features
        (nn.LayerNorm(64), False),
        (lambda x: x.cumsum(-1), False),
        (lambda x: x.triu(), False),  # by position
        (lambda x: torch.zeros(x.shape).copy_(x), False),
        (lambda x: x + torch.ones(x.shape).index_fill_(-1, torch.tensor([3]), 2.0), False),
        (lambda x: x + torch.ones(x.shape[-1]), True),  # the same for each feature
    ],
)
def test_what_may_stand_between_two_layers(between: Any, is_cut: bool) -> None:
    with torch.device("meta"):
        model = Blocks(between)
    found = structured(model)
    assert {"block.up", "block.down"} <= found.keys() if is_cut else "block.up" not in found


@pytest.mark.parametrize("family", ["bloom", "falcon", pytest.param("gpt_oss", marks=OTHERWISE), "glm_ocr", "mamba"])
def test_little_is_whole_at_real_widths(family: str) -> None:
    """The sizes are those of the families' default configurations."""
    with torch.device("meta"):
        model = families._model_class(families.small_config(family))._from_config(transformers.CONFIG_MAPPING[family]())
    styles = expand(model, model_rules(model, AUTO).styles, {}).parameters
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    cut = {
        name
        for name, style in styles.items()
        if style == "interleaved_rowwise" or does_cut(ALL_PARALLEL_STYLES.find(style))
    }
    assert sum(size for name, size in sizes.items() if name not in cut) < 0.05 * sum(sizes.values())


@OTHERWISE
def test_a_tower_without_rules_gets_some_and_the_plan_stays() -> None:
    model = on_meta("llava")
    added, _ = added_styles(model, model.tp_plan)
    inside = {name.partition(".layers.")[0].rpartition(".fc")[0] or name for name in added}
    assert any("vision_tower" in name for name in inside)
    assert not any("language_model" in name for name in added)
    rules = model_rules(model, AUTO)
    assert {pattern: rules.styles[pattern] for pattern in model.tp_plan} == dict(model.tp_plan)


@OTHERWISE
def test_a_model_with_a_full_plan_gets_nothing() -> None:
    rules = model_rules(on_meta("llama"), AUTO)
    assert rules.added == frozenset()


def test_the_general_plan_of_a_model_with_a_plan() -> None:
    model = on_meta("llama")
    styles = expand(model, model_rules(model, GENERAL).styles, {}).modules
    assert set(styles.values()) == {"colwise_gather_output", "embedding_colwise"}
    assert model_rules(model, {"extends": GENERAL, "lm_head": "replicate"}).styles["lm_head"] == "replicate"


def test_rules_of_ones_own_go_before_ours() -> None:
    model = on_meta("opt")
    rules = model_rules(model, {"extends": AUTO, "layers.*.fc1": "replicate"})
    assert rules.styles["model.decoder.layers.*.fc1"] == "replicate"
    assert rules.styles["model.decoder.layers.*.fc2"] == "rowwise"


def test_a_forward_of_very_many_operations_is_not_followed() -> None:
    with torch.device("meta"):
        model = Blocks(lambda x: [x := x + 1 for _ in range(13_000)][-1])
    styles, why = structured_styles(model, {name for name, _ in model.named_modules()})
    assert styles == {}
    assert why == "RuntimeError: more than 12,000 operations"


def test_layers_alike_get_what_two_of_them_show() -> None:
    config = families.small_config("opt")
    config.num_hidden_layers = 6
    with torch.device("meta"):
        model = families._model_class(config)._from_config(config)
    styles = structured(model)
    assert {f"model.decoder.layers.{number}.fc2" for number in range(6)} <= styles.keys()
    assert len(model.model.decoder.layers) == 6


def test_a_trace_leaves_the_model_as_it_was() -> None:
    model = on_meta("opt")
    before = {name: (id(p), p.device.type) for name, p in model.named_parameters()}
    numbers = {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert structured(model)
    assert {name: (id(p), p.device.type) for name, p in model.named_parameters()} == before
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == numbers
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_class_without_source_is_taken_to_read_all_that_is_in_it() -> None:
    found = type("Made", (nn.Module,), {})()
    found.inner = nn.Linear(32, 32)
    assert read_elsewhere(found) == {"inner"}

"""Corrections of transformers' plans that make a tensor-parallel run wrong.

Found by comparing every family with its single-process model (transformers 5.17 to 5.23). Each correction computes the
full attention or activation on every rank and cuts only its weights: slower than the plan intends, and exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["CORRECTIONS", "corrected", "has_expert_plan"]

_WHOLE_ATTENTION = {
    **{f"self_attn.{name}": "colwise_gather_output" for name in ("q_proj", "k_proj", "v_proj")},
    "self_attn.o_proj": "rowwise_split_input",
}

# Model type (of a nested configuration too) → the end of a rule's pattern → the style it should have.
CORRECTIONS: dict[str, dict[str, str]] = {
    # The decoder, which has no plan, appends all heads to the cache that the encoder fills.
    "diffusion_gemma_text": _WHOLE_ATTENTION,
    # On every rank dt_proj makes the mask of all heads, but the rank has only the keys of its own heads.
    "doge": {**_WHOLE_ATTENTION, "self_attn.dt_proj": "replicate"},
    # q_norm and k_norm normalize over all heads together.
    "esmc": _WHOLE_ATTENTION,
    # attn.qkv holds query, key and value one after the other, each with all heads (5.17).
    "ernie4_5_vl_moe_vision": {"attn.qkv": "colwise_gather_output", "attn.proj": "rowwise_split_input"},
    # The sparse activation takes the mean and deviation over the whole intermediate size.
    "gemma3n_text": {
        "mlp.gate_proj": "colwise_gather_output",
        "mlp.up_proj": "colwise_gather_output",
        "mlp.down_proj": "rowwise_split_input",
    },
    # The linear attention has an o_proj too, and its other projections have no rules.
    "glm5_next_text": {
        "self_attn.q_b_proj": "colwise_gather_output",
        "self_attn.kv_b_proj": "colwise_gather_output",
        "self_attn.o_proj": "rowwise_split_input",
    },
    # The value embeddings and the scale alpha have all heads.
    "neomme": {
        **_WHOLE_ATTENTION,
        "output_projection.gate_proj": "colwise_gather_output",
        "output_projection.o_proj": "rowwise_split_input",
    },
}


# The experts of these take every token scaled by its router's score, not the routes (5.17 has a plan all the same).
_NO_EXPERT_PLAN = ("llama4_text",)


def has_expert_plan(config: Any) -> bool:
    """Whether the model sends tokens to its experts by route, so that a rank can hold only some experts."""
    return not set(_model_types(config)) & set(_NO_EXPERT_PLAN)


def corrected(rules: Mapping[str, str], config: Any) -> tuple[dict[str, str], tuple[str, ...]]:
    """Correct a model's own rules. Returns all rules and the patterns of those corrected. `config` is the model's."""
    fixes = {end: style for kind in _model_types(config) for end, style in CORRECTIONS.get(kind, {}).items()}
    found = dict(rules)
    for pattern in rules:
        for end, style in fixes.items():
            if pattern == end or pattern.endswith(f".{end}"):
                found[pattern] = style
        experts = pattern.removesuffix(".gate_up_proj")
        if experts != pattern and rules.get(f"{experts}.down_proj") == "rowwise":
            found.setdefault(experts, "moe_tp_experts")  # qwen3_omni_moe of 5.17 leaves the sum unreduced
    return found, tuple(pattern for pattern in found if found[pattern] != rules.get(pattern))


def _model_types(config: Any) -> Iterable[str]:
    yield getattr(config, "model_type", "")
    for part in getattr(config, "sub_configs", {}):
        yield from _model_types(getattr(config, part, None))

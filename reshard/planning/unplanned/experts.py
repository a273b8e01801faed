"""Mixtures of experts in transformers' common form, which the model's plan leaves out: a slice of every expert on
each rank."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

__all__ = ["expert_styles"]


def expert_styles(model: nn.Module, allowed: Collection[str]) -> dict[str, str]:
    """Return the styles of experts among the `allowed` modules, and of their parameters, by name.

    They are those that transformers can run by any of its functions for experts: weights of all experts in one tensor
    each, experts × output × input features, or experts × input × output if they are transposed; an elementwise gate
    between the two, and a sum over the experts of a token. With a norm behind each expert, it is no such sum.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if name in allowed and is_common(module) and not module.has_post_expert_norm:
            found |= {f"{name}.{own}": style for own, style in _parameters(module).items()}
            if any(key.startswith(f"{name}.") for key in found):
                found[name] = "moe_tp_experts"
    return found


def is_common(module: Any) -> bool:
    """Whether a module holds experts in the common form."""
    return all(
        hasattr(module, flag) for flag in ("is_transposed", "is_concatenated", "has_gate", "has_post_expert_norm")
    )


def _parameters(module: Any) -> dict[str, str]:
    last, first = ("rowwise", "colwise") if module.is_transposed else ("colwise", "rowwise")
    up = "gate_up_proj" if module.has_gate else "up_proj"
    bias = "rowwise"  # experts × features
    if module.has_gate and module.is_concatenated:
        last, bias = f"packed_{last}", "packed_rowwise"
    elif module.has_gate:
        if not module.is_transposed:
            return {}
        last = bias = "interleaved_rowwise"
    styles = {up: last, "down_proj": first, f"{up}_bias": bias, "down_proj_bias": "replicate"}
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    return {name: styles[name] for name in own} if {up, "down_proj"} <= own <= styles.keys() else {}

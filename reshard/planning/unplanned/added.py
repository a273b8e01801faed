"""The parts of a model that its plan leaves out: all of it, or a vision tower, or the layers of another kind."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from .experts import expert_styles, is_common
from .general import can_be_cut, general_styles
from .names import wildcard
from .structure import structured_styles

__all__ = ["added_styles", "by_pattern"]

_LEAST = 0.02  # of a model's elements: what is less is not worth a look
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def added_styles(model: Any, patterns: Collection[str]) -> tuple[dict[str, str], str | None]:
    """Return the styles of modules in the parts of a model that no rule is for. `patterns` are those of its rules. If
    all of the model is such a part, and its forward cannot be traced, say why."""
    parts = tuple(_left_out(model, patterns))
    inside = tuple(f"{name}." for name in parts if name)
    allowed = {name for name, _ in model.named_modules() if name in parts or name.startswith(inside) or "" in parts}
    sizes = {name: _elements(module) for name, module in model.named_modules()}
    cut = sum(sizes[name] for name, module in model.named_modules() if name in allowed and _is_cut(module))
    if cut <= _LEAST * sum(sizes.values()):
        return {}, None
    general = {name: style for name, style in general_styles(model).items() if name in allowed}
    structured, why = structured_styles(model, allowed)
    return general | expert_styles(model, allowed) | structured, why if "" in parts else None


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module._parameters.values() if parameter is not None)


def _is_cut(module: nn.Module) -> bool:
    return can_be_cut(module) or is_common(module)


def _left_out(model: Any, patterns: Collection[str]) -> Iterator[str]:
    """Yield the largest modules that no rule is for, neither for them nor for anything in them, and that get replicated
    hidden states: those between the parts of a model, or of one of its layers, that have rules."""
    ruled = {
        name
        for name, _ in [*model.named_modules(remove_duplicate=False), *model.named_parameters(remove_duplicate=False)]
        if not {name, wildcard(name)}.isdisjoint(patterns)
    }
    above = {name[:end] for name in ruled for end, character in enumerate(name) if character == "."}
    above |= {""} if ruled else set()

    def visit(name: str, module: nn.Module, is_layer: bool) -> Iterator[str]:
        if name in ruled:
            return
        if name not in above:
            yield name
            return
        children = [(f"{name}.{own}" if name else own, child) for own, child in module.named_children()]
        cut = any(inner in ruled and not child._modules for inner, child in children)
        for inner, child in children:
            if is_layer and inner in above:
                continue  # a block with rules: hidden states inside it may be cut
            if is_layer and cut and not child._modules:
                continue  # it may stand between two modules that are cut
            if not is_layer or inner not in ruled:
                within = isinstance(child, _CONTAINERS) or hasattr(child, "config_class")
                yield from visit(inner, child, is_layer=not within)

    yield from visit("", model, is_layer=False)


def by_pattern(model: Any, styles: Mapping[str, str]) -> dict[str, str]:
    """Write styles by name as rules: pattern → style where all modules of a pattern have one style, else name →
    style."""
    kinds: dict[str, set[str | None]] = {}
    for name, _ in [*model.named_modules(remove_duplicate=False), *model.named_parameters(remove_duplicate=False)]:
        kinds.setdefault(wildcard(name), set()).add(styles.get(name))
    return {wildcard(name) if len(kinds[wildcard(name)]) == 1 else name: style for name, style in styles.items()}

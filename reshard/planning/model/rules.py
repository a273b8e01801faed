"""Rules of a plan (pattern → style), and the style that they give every parameter and module of a model.

Patterns are written as transformers writes them: the name of a module or parameter with `*` for every layer number. A
rule for a module is also the rule of its own parameters, unless they have one.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import BadInputError
from ...files.system import by_errno
from ...files.untrusted import read_json
from ...resharded.manifest import Manifest
from ...strategies.registry import heads_in
from ...text import listed, printable
from ..unplanned.names import wildcard
from .corrections import corrected, has_expert_plan

if TYPE_CHECKING:
    import torch

__all__ = [
    "AUTO",
    "GENERAL",
    "OTHER_NAMES",
    "Rules",
    "Styles",
    "expand",
    "expert_rules",
    "fits",
    "model_rules",
    "noted_styles",
    "read_rules",
    "wildcard",
]

AUTO, GENERAL = "auto", "general"
OTHER_NAMES = "the folder's plan has other names than the installed transformers: the model's own plan is taken"
_BASE = "extends"  # the key of a plan file that names the rules it adds to

# Names of the styles for modules that are not an `nn.Linear`. 5.17 shards embeddings by the linear styles as well.
_FOR_EMBEDDINGS = {
    "colwise": "embedding_colwise",
    "rowwise": "embedding_rowwise",
    "local_colwise": "embedding_local_colwise",
}
_FOR_CONV1D = {
    **{style: f"conv1d_{style}" for style in ("colwise", "colwise_gather_output", "rowwise", "rowwise_split_input")},
    **{"colwise_rep": "conv1d_colwise_gather_output", "rowwise_rep": "conv1d_rowwise_split_input"},
}


def read_rules(path: str | Path) -> dict[str, str]:
    """Read the rules of a plan file, JSON or TOML by its suffix: pattern → style, and perhaps `extends = "auto"`.

    Raises:
        BadInputError: the file cannot be read, or holds no such rules.
    """
    path = Path(path)
    if path.suffix == ".toml":
        rules = _read_toml(path)
    elif path.suffix == ".json":
        rules = read_json(path)
    else:
        raise BadInputError(f"{printable(path)}: a plan is a .json or a .toml file")
    if not isinstance(rules, dict) or not rules:
        raise BadInputError(f"{printable(path)}: holds no rules", hint='a rule is: "layers.*.mlp.up_proj": "colwise"')
    for pattern, style in rules.items():
        if not isinstance(style, str):
            raise BadInputError(
                f"{printable(path)}: the style of {printable(pattern)} is not a name",
                hint="in TOML, write patterns in quotes" if path.suffix == ".toml" else None,
            )
    return rules


def _read_toml(path: Path) -> Any:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise by_errno(error, f"{printable(path)}: cannot be read: {error.strerror}", BadInputError) from None
    except ValueError as error:
        raise BadInputError(f"{printable(path)}: not valid TOML: {printable(error)}") from None


@dataclass(frozen=True, slots=True)
class Rules:
    """Pattern → style, in full names. `written` are the user's patterns, `corrected` those of the model put right, and
    `added` those of modules that the model has no rules for. `note` is a remark for the user on these."""

    styles: dict[str, str]
    written: frozenset[str] = frozenset()
    corrected: tuple[str, ...] = ()
    added: frozenset[str] = frozenset()
    note: str | None = None


def model_rules(model: Any, tp_plan: Mapping[str, str] | str) -> Rules:
    """Return the rules to use for a model.

    `tp_plan` is "auto", for the model's own rules and ours for what they leave out; "general", for the general plan; or
    the user's rules, which replace these unless they extend one of them. A pattern may leave out the beginning of a
    name, such as `model.`, if only one name ends with it.

    Raises:
        BadInputError: a rule matches nothing, or several kinds of modules, or two match the same.
    """
    if isinstance(tp_plan, str):
        if tp_plan not in _BASES:
            raise BadInputError(
                f"tp_plan is {printable(tp_plan)!r}", hint='give "auto", "general", a plan file, or rules'
            )
        return _BASES[tp_plan](model)
    rules = dict(tp_plan)
    base = rules.pop(_BASE, None)
    if base is not None and base not in _BASES:
        raise BadInputError(
            f"the plan extends {printable(base)!r}", hint=" or ".join(f'{_BASE} = "{name}"' for name in _BASES)
        )
    names = list(dict.fromkeys(wildcard(name) for name, _ in _named(model)))
    written: dict[str, str] = {}
    for pattern, style in rules.items():
        name = _full_name(pattern, names)
        if name in written:
            raise BadInputError(f"two rules are for {printable(name)}", hint=f"one is {printable(pattern)}")
        written[name] = style
    if base is None:
        return Rules(written, frozenset(written))
    own = _BASES[base](model)
    theirs = {name: style for name, style in own.styles.items() if not {name, wildcard(name)} & written.keys()}
    kept = tuple(pattern for pattern in own.corrected if pattern in theirs)
    return Rules({**theirs, **written}, frozenset(written), kept, own.added & theirs.keys(), own.note)


def _own_rules(model: Any) -> Rules:
    from ..unplanned.added import added_styles, by_pattern

    styles, put_right = corrected(model.tp_plan or {}, model.config)
    found, why = added_styles(model, styles.keys())
    added = by_pattern(model, found)
    note = f"every layer is cut by its output features, since its forward cannot be followed: {printable(why)}"
    return Rules({**styles, **added}, frozenset(), put_right, frozenset(added), note if why and added else None)


def _general_rules(model: Any) -> Rules:
    from ..unplanned.added import by_pattern
    from ..unplanned.general import general_styles

    found = by_pattern(model, general_styles(model))
    return Rules(found, added=frozenset(found))


_BASES: dict[str, Callable[[Any], Rules]] = {AUTO: _own_rules, GENERAL: _general_rules}


def _named(model: Any) -> list[tuple[str, Any]]:
    return [*model.named_modules(), *model.named_parameters(remove_duplicate=False)]


def _full_name(pattern: str, names: list[str]) -> str:
    if pattern in names:
        return pattern
    found = [name for name in names if name.endswith(f".{pattern}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise BadInputError(f"the rule for {printable(pattern)} is ambiguous", hint=f"write one of: {listed(found)}")
    near = difflib.get_close_matches(wildcard(pattern), names, n=4, cutoff=0.5)
    near += [name for name in names if name.endswith("." + pattern.rpartition(".")[2]) and name not in near]
    raise BadInputError(
        f"the rule for {printable(pattern)} matches nothing in the model",
        hint=f"names like it: {listed(near)}" if near else "reshard plan SOURCE --tp-size 1 prints every parameter",
    )


def expert_rules(model: Any) -> dict[str, str]:
    """Return the model's expert-parallel rules: those of modules that hold experts, and of parameters cut by expert.

    transformers 5.17 masks routes at the router and reduces after the experts; here both happen around the experts.
    """
    rules = dict(getattr(model, "_ep_plan", None) or {}) if has_expert_plan(model.config) else {}
    if "ep_router" in rules.values():
        rules = {pattern: style.replace("moe_tp_experts", "ep_dispatch_experts") for pattern, style in rules.items()}
    # Some models list the rules of other modules again.
    return {pattern: style for pattern, style in rules.items() if style in ("grouped_gemm", "ep_dispatch_experts")}


@dataclass(frozen=True, slots=True)
class Styles:
    """Styles by full name: of `parameters`, of `modules` (whose forward they surround), and of the parameters that are
    cut by expert. `unused` are rules that match nothing."""

    parameters: dict[str, str] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    experts: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def fits(styles: Styles, model: Any) -> bool:
    """Whether a model has all parameters and modules that are named."""
    modules = {name for name, _ in model.named_modules()}
    return styles.parameters.keys() <= model.state_dict().keys() and styles.modules.keys() <= modules


def noted_styles(manifest: Manifest) -> Styles:
    """Return the styles that a manifest notes. A tied parameter that it does not list is cut as its owner is."""
    styles = {target.name: target.style for target in manifest.of_model}
    styles |= {name: styles.get(owner) for name, owner in manifest.tied.items()}
    return Styles({name: style for name, style in styles.items() if style}, manifest.hooks)


def expand(model: Any, rules: Mapping[str, str], experts: Mapping[str, str]) -> Styles:
    """Find the style of every parameter (by its own rule, else its module's) and of every module that has a rule.

    A module's expert rule takes precedence over its other rule, and over the rules of the modules inside it.
    """
    found, used = Styles(), set()
    inside: list[str] = []  # modules with an expert rule
    for module_name, module in model.named_modules():
        rule = module_name if module_name in rules else wildcard(module_name)
        if rule in experts:
            found.modules[module_name] = experts[rule]
            inside.append(f"{module_name}.")
        elif rule in rules and not module_name.startswith(tuple(inside)):
            found.modules[module_name] = _for_module(rules[rule], module)
        used |= {rule} & rules.keys()
        for own, _ in module.named_parameters(recurse=False):
            name = f"{module_name}.{own}" if module_name else own
            exact = name if name in rules else wildcard(name)
            used |= {exact} & rules.keys()
            if exact in experts:
                found.experts[name] = experts[exact]
            elif name.startswith(tuple(inside)):
                continue
            if exact in rules:
                found.parameters[name] = _for_experts(rules[exact], module, own)
            elif rule in rules and heads_in(rules[rule]) is None:
                found.parameters[name] = _for_module(rules[rule], module)
    return Styles(found.parameters, found.modules, found.experts, tuple(rule for rule in rules if rule not in used))


def _for_module(style: str, module: torch.nn.Module) -> str:
    import torch

    if isinstance(module, torch.nn.Embedding):
        if len(module._parameters) > 1:  # t5gemma2's looks for its own tokens in the ids, and a cut would shift the ids
            return "replicate"
        return _FOR_EMBEDDINGS.get(style, style)
    if style.startswith("embedding_") and not module._parameters:
        return "replicate"  # something around an embedding (neomme in 5.17)
    if type(module).__name__ == "Conv1D":  # transformers.pytorch_utils.Conv1D, which GPT-2 and its kin use
        return f"conv1d_{style}" if style.startswith("packed_colwise") else _FOR_CONV1D.get(style, style)
    return style


def _for_experts(style: str, module: Any, own: str) -> str:
    """Return the style of a parameter of experts: gate|up side by side are packed.

    inkling's plan cuts them contiguously, as they alternate in its checkpoint. Here they are cut after the conversion,
    which puts them side by side.
    """
    fused = getattr(module, "is_concatenated", False) and own.startswith("gate_up_proj")
    return "packed_colwise" if fused and style == "colwise" else style

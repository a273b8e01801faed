"""The transformers side of planning: what the model's parameters are, how its tp_plan cuts them, and which source
tensors they are made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from .architecture import KV_GROUPS, expected_dtypes, meta_model
from .dtypes import FLOATING, torch_name
from .errors import BadInputError, printable
from .regions import Region, covers
from .source import Source
from .symbolic import NotACopyError, RegionTensor

__all__ = ["Model", "Parameter", "read_model"]

# Projections whose output the attention views as heads, and the config field that counts them.
_HEADS = {
    "q_proj": "num_attention_heads",
    "k_proj": "num_key_value_heads",
    "v_proj": "num_key_value_heads",
    "query_key_value": "num_attention_heads",
}


_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers", "depth")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One entry of the model's state dict: a parameter or a persistent buffer.

    `dtype` is what the model computes with (a torch name). `heads` counts the attention heads along its cut dim where
    the module views its output as heads, so that no head may be cut in two. `shared` are heads that several ranks can
    hold alike: KV heads, each used by the query heads of its group.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    style: str | None
    heads: int | None
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint seen by its model: no data has been read.

    `regions` says for each parameter present in the checkpoint where its elements come from; `unused` are source
    tensors that the model does not take; `missing` are parameters the checkpoint lacks.
    """

    architecture: str
    model_type: str
    dtype: str
    parameters: tuple[Parameter, ...]
    hooks: dict[str, str]
    unused_rules: tuple[str, ...]
    tied: dict[str, str]
    regions: dict[str, tuple[Region, ...]]
    unused: tuple[str, ...]
    missing: tuple[str, ...]


def read_model(source: Source, *, dtype: str | None = None) -> Model:
    """Match a checkpoint with its model. `dtype` (a torch name) overrides the configuration's.

    Raises:
        BadInputError: quantized, not buildable, a conversion that computes values, or shapes that do not match.
    """
    _refuse_quantized(source)
    _refuse_absurd(source)
    dtype = dtype or _model_dtype(source)
    model = meta_model(source.root, dtype=dtype)
    wanted = model.state_dict()
    regions, unused = _map_sources(model, source, wanted)
    styles, hooks, unused_rules = _expand_plan(model, model.tp_plan or {})
    dtypes = expected_dtypes(model, dtype)
    tied = {name: owner for name, owner in model.all_tied_weights_keys.items() if name in wanted and owner in wanted}
    buffers = {name for name, _ in model.named_buffers()}
    optional = _pattern(model._keys_to_ignore_on_load_missing)
    parameters = tuple(
        Parameter(
            name,
            tuple(tensor.shape),
            str(dtypes[name]).removeprefix("torch."),
            styles.get(name),
            *_heads(model, name, styles.get(name), tuple(tensor.shape)),
        )
        for name, tensor in wanted.items()
    )
    twins = {*tied, *(owner for name, owner in tied.items() if name in regions)}
    missing = tuple(
        name
        for name in wanted
        if name not in regions and name not in twins and not (name in buffers and optional and optional.search(name))
    )
    return Model(
        type(model).__name__,
        model.config.model_type,
        dtype,
        parameters,
        hooks,
        unused_rules,
        tied,
        regions,
        unused,
        missing,
    )


def _refuse_quantized(source: Source) -> None:
    for config in (source.config, source.config.get("text_config")):
        if isinstance(config, dict) and config.get("quantization_config") is not None:
            method = config["quantization_config"]
            name = method.get("quant_method") if isinstance(method, dict) else method
            raise BadInputError(
                f"{printable(source.root)}: quantized checkpoints ({printable(name)}) cannot be resharded yet",
                hint="start from the unquantized checkpoint",
            )


def _refuse_absurd(source: Source) -> None:
    """A layer without a tensor of its own cannot be: refuse before building what the config asks for."""

    def walk(config: dict[str, Any]) -> None:
        for key, value in config.items():
            if key in _LAYER_COUNTS and isinstance(value, int) and not 0 <= value <= len(source.tensors):
                raise BadInputError(f"config.json: {key} is {value}; the checkpoint has {len(source.tensors)} tensors")
            if isinstance(value, dict):
                walk(value)

    walk(source.config)


def _model_dtype(source: Source) -> str:
    """The dtype of `from_pretrained(dtype="auto")`: the config's, else that of the first floating tensor."""
    named = source.config.get("dtype") or source.config.get("torch_dtype")
    text = source.config.get("text_config")
    if named is None and isinstance(text, dict):
        named = text.get("dtype") or text.get("torch_dtype")
    if isinstance(named, str) and named.removeprefix("torch.") in FLOATING:
        return named.removeprefix("torch.")
    found = (torch_name(info.dtype, tensor=info.name) for info in source.tensors.values())
    return next((name for name in found if name in FLOATING), "float32")


def _pattern(patterns: Any) -> re.Pattern[str] | None:
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None


def _wildcard(name: str) -> str:
    """Layer numbers as `*`, the way plans are written (transformers' `replace_layer_number_by_wildcard`)."""
    return re.sub(r"\.\d+(\.|$)", lambda match: ".*" + match.group(1), name)


def _expand_plan(model: Any, plan: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
    """Concrete styles: of every parameter (its own rule, else its module's), and of every module that has a rule."""
    styles, hooks, used = {}, {}, set()
    for module_name, module in model.named_modules():
        rule = _wildcard(module_name)
        if rule in plan:
            hooks[module_name] = _for_module(plan[rule], module)
            used.add(rule)
        for own, _ in module.named_parameters(recurse=False):
            name = f"{module_name}.{own}" if module_name else own
            exact = _wildcard(name)
            if exact in plan:
                styles[name] = _for_experts(plan[exact], module, own)
                used.add(exact)
            elif rule in plan:
                styles[name] = hooks[module_name]
    return styles, hooks, tuple(rule for rule in plan if rule not in used)


def _for_module(style: str, module: torch.nn.Module) -> str:
    """transformers 5.17 shards embeddings by the linear styles; later ones name what it does."""
    if isinstance(module, torch.nn.Embedding) and style in ("colwise", "rowwise"):
        return f"embedding_{style}"
    return style


def _for_experts(style: str, module: Any, own: str) -> str:
    """gate|up side by side are packed. inkling's plan cuts them contiguously, as they alternate in its checkpoint: but
    they are cut here after the conversion that puts them side by side."""
    fused = getattr(module, "is_concatenated", False) and own.startswith("gate_up_proj")
    return "packed_colwise" if fused and style == "colwise" else style


def _heads(model: Any, name: str, style: str | None, shape: tuple[int, ...]) -> tuple[int | None, bool]:
    """How many heads a parameter's cut dim holds, and whether ranks may share them."""
    projection = name.split(".")[-2] if "." in name else ""
    if style != "colwise" or projection not in _HEADS:
        return None, False
    config = model.config.get_text_config()
    attention = model.get_submodule(name.rsplit(".", 2)[0])
    # Each rank then runs fewer query heads for each KV head it holds, which the attention must be told of.
    shared = _HEADS[projection] == "num_key_value_heads" and hasattr(attention, KV_GROUPS)
    head_dim = getattr(attention, "head_dim", None)
    if projection != "query_key_value" and isinstance(head_dim, int) and shape[0] % head_dim == 0:
        return shape[0] // head_dim, shared
    return getattr(config, _HEADS[projection], None) or getattr(config, "num_attention_heads", None), shared


def _map_sources(
    model: Any, source: Source, wanted: Mapping[str, torch.Tensor]
) -> tuple[dict[str, tuple[Region, ...]], tuple[str, ...]]:
    """Run transformers' own renamings and conversions on symbolic tensors.

    The grouping follows `convert_and_load_state_dict_in_model`; the conversion sees whole tensors, so it comes before
    any cut. Returns the regions of each parameter, and the source tensors that no parameter takes.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix

    found: dict[str, RegionTensor] = {}
    groups: dict[str, Any] = {}
    taken: dict[str, list[str]] = {}
    unused = []
    for key in sorted(source.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if target not in wanted and key in wanted:
            target, pattern = rename_source_key(key, [], [], prefix, wanted)
        if target not in wanted:
            unused.append(key)
            continue
        info = source.tensors[key]
        tensor = RegionTensor.of_source(key, info.shape, getattr(torch, torch_name(info.dtype, tensor=key)))
        if pattern is None:
            if target in found:
                raise BadInputError(f"{printable(key)}: a second source tensor for parameter {printable(target)}")
            found[target] = tensor
        else:
            group = groups.setdefault(target, deepcopy(by_pattern[pattern]))
            group.add_tensor(target, key, pattern, tensor)
            taken.setdefault(target, []).append(key)
    for first, group in groups.items():
        found.update(_convert(first, group, model, wanted, taken[first]))

    regions = {}
    for name, tensor in found.items():
        if tuple(tensor.shape) != tuple(wanted[name].shape):
            raise BadInputError(
                f"{printable(name)}: the model wants shape {list(wanted[name].shape)},"
                f" the checkpoint has {list(tensor.shape)}"
            )
        if not covers(tensor.regions, tuple(tensor.shape)):
            raise BadInputError(f"{printable(name)}: the checkpoint's tensors do not fill it exactly")
        regions[name] = tensor.regions
    return regions, tuple(unused)


def _convert(
    first: str, group: Any, model: Any, wanted: Mapping[str, torch.Tensor], sources: list[str]
) -> dict[str, RegionTensor]:
    operations = ", ".join(type(operation).__name__ for operation in group.operations)
    try:
        result = group.convert(first, model=model, config=model.config)
    except NotACopyError as error:
        raise BadInputError(
            f"{printable(first)}: its conversion ({operations}) computes values ({error}), which is not supported yet"
        ) from None
    except Exception as error:
        raise BadInputError(
            f"{printable(first)}: cannot be made from {printable(sources[0])} and {len(sources) - 1} more"
            f" ({operations}): {printable(error)}"
        ) from None
    converted = {name: value[0] if isinstance(value, list) else value for name, value in result.items()}
    unknown = [name for name in converted if name not in wanted]
    if unknown:
        raise BadInputError(f"{printable(unknown[0])}: made by {operations}, but the model has no such parameter")
    return converted

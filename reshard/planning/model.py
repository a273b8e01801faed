"""The transformers side of planning: the model's parameters, the styles that its tp_plan gives them, and the source
tensors they are made of."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..checkpoint.architecture import class_note, expected_dtypes, meta_model
from ..checkpoint.naming import Naming
from ..checkpoint.source import Source, dtype_of
from ..errors import BadInputError, TopologyError
from ..files.dtypes import torch_name
from ..sharding.regions import Region, covers
from ..strategies.symbolic import NotACopyError, RegionTensor, casts_left_to_the_copy
from ..text import listed, printable
from .cache import CacheLayer, cache_layers
from .heads import Heads, heads_of, number_of
from .rules import AUTO, OTHER_NAMES, Rules, Styles, expand, expert_rules, fits, model_rules, wildcard

__all__ = ["Model", "Parameter", "read_model"]

_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers", "depth")
_PARAMETERS = 20  # allowed for each tensor of the checkpoint: conversions make far fewer of one


@dataclass(frozen=True, slots=True)
class Parameter:
    """One entry of the model's state dict: a parameter or a persistent buffer.

    `dtype` is what the model computes with (a torch name). `style` cuts it by tensor parallelism, `expert_style` by
    expert. `heads` are the attention heads along its cut dim, none of which may be cut in two.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    style: str | None
    heads: Heads | None = None
    expert_style: str | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint seen by its model: no data has been read.

    `regions` says for each parameter present in the checkpoint where its elements come from; `unused` are source
    tensors that the model does not take; `missing` are parameters the checkpoint lacks. `hooks` are the styles of
    modules, `manual` the modules whose style the user chose. `experts` is the least number of experts of a layer.
    `unused_rules` of the plan match nothing; `corrected_rules` are wrong rules of the model's own, put right.
    `cache` are the layers that keep keys and values, if known, `max_length` the longest sequence by the configuration.
    `notes` are remarks for the user, one line each: which class was taken and why, and the like.
    """

    architecture: str
    model_type: str
    dtype: str
    parameters: tuple[Parameter, ...]
    hooks: dict[str, str]
    manual: frozenset[str]
    experts: int
    unused_rules: tuple[str, ...]
    corrected_rules: tuple[str, ...]
    tied: dict[str, str]
    regions: dict[str, tuple[Region, ...]]
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    cache: tuple[CacheLayer, ...] | None = None
    max_length: int | None = None
    notes: tuple[str, ...] = ()


def read_model(
    source: Source,
    *,
    dtype: str | None = None,
    tp_plan: Mapping[str, str] | str = AUTO,
    experts: bool = False,
    noted: Styles | None = None,
) -> Model:
    """Match a checkpoint with its model. `dtype` (a torch name) overrides the configuration's, `tp_plan` (rules, see
    `model_rules`) the model's own. `experts` applies its expert-parallel rules too. Styles that a folder has `noted`
    take the place of all rules, unless the installed transformers has other names for the model's parts.

    Raises:
        BadInputError: quantized, not buildable, a conversion that computes values, shapes that do not match, or rules
            that match nothing.
        TopologyError: `experts` is set, and the model has no rules for them.
    """
    _refuse_quantized(source)
    _refuse_absurd(source)
    dtype = dtype or dtype_of(source)
    with _few_parameters(source):
        model = meta_model(source.root, dtype=dtype)
    wanted = model.state_dict()
    naming = Naming(model, source.tensors)
    regions, unused = _map_sources(naming, model, source, wanted)
    travels = noted is not None and fits(noted, model)
    rules = Rules({}) if travels else model_rules(model, tp_plan)
    expert = expert_rules(model)
    if experts and not expert:
        raise TopologyError(f"{type(model).__name__} has no expert-parallel plan", hint="leave out --ep-size")
    styles = noted if noted and travels else expand(model, rules.styles, expert if experts else {})
    heads = heads_of(model, styles.parameters, {name: tuple(tensor.shape) for name, tensor in wanted.items()})
    counts = {wanted[name].shape[0] for name in expand(model, {}, expert).experts}
    dtypes = expected_dtypes(model, dtype)
    tied = _tied(model, wanted)
    buffers = {name for name, _ in model.named_buffers()}
    optional = _pattern(model._keys_to_ignore_on_load_missing)
    parameters = tuple(
        Parameter(
            name,
            tuple(tensor.shape),
            str(dtypes[name]).removeprefix("torch."),
            styles.parameters.get(name),
            heads.get(name),
            styles.experts.get(name),
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
        styles.modules,
        frozenset(name for name in styles.modules if wildcard(name) in rules.written),
        min(counts, default=0),
        styles.unused,
        rules.corrected,
        tied,
        regions,
        unused,
        missing,
        cache_layers(model, heads),
        number_of(model.config.get_text_config(), "max_position_embeddings"),
        tuple(
            filter(
                None,
                (
                    class_note(type(model), source.config),
                    *(naming.notes(unused) if naming.prefix or missing else ()),
                    OTHER_NAMES if noted and not travels else None,
                ),
            )
        ),
    )


def _tied(model: Any, wanted: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return each tied parameter and its owner: the parameter whose tensor it shares, which is tied to no other."""
    pairs: dict[str, str] = model.all_tied_weights_keys
    tied = {}
    for name in pairs:
        owner, seen = name, {name}
        while pairs.get(owner, name) not in seen:
            owner = pairs[owner]
            seen.add(owner)
        if owner != name and name in wanted and owner in wanted:
            tied[name] = owner
    return tied


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
    """Refuse, before it is built, a model with more layers than tensors, or more labels than a tensor has rows."""
    if "configuration_files" in source.config:
        raise BadInputError(
            "config.json: names other files to take its place (configuration_files), which are not read",
            hint="put the one that you want in its place",
        )
    rows = max((size for info in source.tensors.values() for size in info.shape), default=0)
    most = {**dict.fromkeys(_LAYER_COUNTS, len(source.tensors)), "num_labels": rows}

    def walk(config: dict[str, Any]) -> None:
        for key, value in config.items():
            if key in most and isinstance(value, int) and not 0 <= value <= most[key]:
                raise BadInputError(
                    f"config.json: {key} is {printable(value)}; the checkpoint has {len(source.tensors)} tensors,"
                    f" of {rows} rows at most"
                )
            if isinstance(value, dict):
                walk(value)

    walk(source.config)


@contextlib.contextmanager
def _few_parameters(source: Source) -> Iterator[None]:
    """Stop building a model with far more parameters than its checkpoint has tensors: a crafted number asks for it."""
    most = _PARAMETERS * (len(source.tensors) + 100)
    made = 0

    def count(*_: object) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise ValueError(f"more than {most} parameters, and the checkpoint has {len(source.tensors)} tensors")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _pattern(patterns: Any) -> re.Pattern[str] | None:
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None


def _map_sources(
    naming: Naming, model: Any, source: Source, wanted: Mapping[str, torch.Tensor]
) -> tuple[dict[str, tuple[Region, ...]], tuple[str, ...]]:
    """Run transformers' own renamings and conversions on symbolic tensors.

    The grouping follows `convert_and_load_state_dict_in_model`; the conversion sees whole tensors, so it comes before
    any cut. Returns the regions of each parameter, and the source tensors that no parameter takes.
    """
    from transformers.core_model_loading import dot_natural_key

    found: dict[str, RegionTensor] = {}
    groups: dict[str, Any] = {}
    taken: dict[str, list[str]] = {}
    unused, empty = [], []
    for key in sorted(source.tensors, key=dot_natural_key):
        target, pattern = naming.target(key)
        if target is None:
            unused.append(key)
            continue
        info = source.tensors[key]
        if 0 in info.shape and wanted[target].numel():
            empty.append(key)
        tensor = RegionTensor.of_source(key, info.shape, getattr(torch, torch_name(info.dtype, tensor=key)))
        if pattern is None:
            if target in found:
                raise BadInputError(f"{printable(key)}: a second source tensor for parameter {printable(target)}")
            found[target] = tensor
        else:
            group = groups.setdefault(target, deepcopy(naming.converters[pattern]))
            group.add_tensor(target, key.removeprefix(naming.prefix), pattern, tensor)
            taken.setdefault(target, []).append(key)
    if empty:
        raise BadInputError(
            f"{len(empty)} tensors of the checkpoint are empty, as DeepSpeed ZeRO-3 leaves them where the parameters"
            f" are not gathered before saving: {listed(empty)}",
            hint="write them with DeepSpeed's zero_to_fp32.py, or save again with"
            " stage3_gather_16bit_weights_on_model_save",
        )
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
        with casts_left_to_the_copy():
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

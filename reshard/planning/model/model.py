"""The transformers side of planning: the model's parameters, the styles that its tp_plan gives them, and the source
tensors they are made of."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from ...checkpoint.architecture import class_note, expected_dtypes, meta_model
from ...checkpoint.naming import Naming
from ...checkpoint.source import Source, dtype_of
from ...errors import BadInputError, TopologyError
from ...sharding.regions import Region
from ...text import printable
from ...transforms.bundle import Quantized
from ..remarks import LARGE_SHARE
from ..unplanned.general import general_styles
from .cache import CacheLayer, cache_layers
from .heads import Heads, heads_of, number_of
from .quantized import Matrices
from .rules import AUTO, OTHER_NAMES, Rules, Styles, expand, expert_rules, fits, model_rules, wildcard
from .sources import Held, map_sources
from .units import heads_in_units, units_of

__all__ = ["Model", "Parameter", "read_model"]

_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers", "depth")
_PARAMETERS = 20  # allowed for each tensor of the checkpoint: conversions make far fewer of one


@dataclass(frozen=True, slots=True)
class Parameter:
    """One entry of the model's state dict: a parameter or a persistent buffer.

    `dtype` is what the model computes with (a torch name). `style` cuts it by tensor parallelism, `expert_style` by
    expert. `heads` are the attention heads along its cut dim, none of which may be cut in two. `unit` is the number of
    elements there that stay together if they can, since quantized ones share entries.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    style: str | None
    heads: Heads | None = None
    expert_style: str | None = None
    unit: int = 1


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint seen by its model: no data has been read.

    `regions` says for each parameter present in the checkpoint where its elements come from; `unused` are source
    tensors that the model does not take; `missing` are parameters the checkpoint lacks. `hooks` are the styles of
    modules, `manual` the modules whose style the user chose. `experts` is the least number of experts of a layer.
    `unused_rules` of the plan match nothing; `corrected_rules` are wrong rules of the model's own, put right.
    `bundles` are the quantized parameters: their regions are those of matrices. `held` are the tensors of bundles.
    `cache` are the layers that keep keys and values, if known, `max_length` the longest sequence by the configuration.
    `notes` are remarks for the user, one line each: which class was taken and why, and the like. `added_rules` are
    those that the model's own plan lacks; `general_cuts` says whether the general plan would cut more of what these
    leave whole.
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
    bundles: dict[str, Quantized] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)
    cache: tuple[CacheLayer, ...] | None = None
    max_length: int | None = None
    notes: tuple[str, ...] = ()
    added_rules: tuple[str, ...] = ()
    general_cuts: bool = False


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
        BadInputError: quantized in an unknown way, not buildable, a conversion that computes values, shapes that do not
            match, or rules that match nothing.
        TopologyError: `experts` is set, and the model has no rules for them.
    """
    matrices = Matrices(source)
    _refuse_absurd(source)
    dtype = dtype or dtype_of(source)
    with _few_parameters(source):
        model = meta_model(source.root, dtype=dtype)
    wanted = model.state_dict()
    naming = Naming(model, (source.tensors.keys() - matrices.taken) | set(matrices.names))
    found = map_sources(naming, matrices, model, source)
    regions, unused = found.regions, found.unused
    travels = noted is not None and fits(noted, model)
    rules = Rules({}) if travels else model_rules(model, tp_plan)
    expert = expert_rules(model)
    if experts and not expert:
        raise TopologyError(f"{type(model).__name__} has no expert-parallel plan", hint="leave out --ep-size")
    styles = noted if noted and travels else expand(model, rules.styles, expert if experts else {})
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    heads = heads_of(model, styles.parameters, shapes, styles.modules)
    heads = heads_in_units(heads, found.bundles, styles.parameters, shapes)
    units = units_of(found.bundles, styles.parameters, shapes, heads)
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
            units.get(name, 1),
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
        found.bundles,
        found.held,
        cache_layers(model, heads),
        number_of(model.config.get_text_config(), "max_position_embeddings"),
        tuple(
            filter(
                None,
                (
                    class_note(type(model), source.config),
                    *(naming.notes(unused) if naming.prefix or missing else ()),
                    OTHER_NAMES if noted and not travels else None,
                    rules.note,
                ),
            )
        ),
        tuple(sorted(rules.added)),
        _general_cuts(model, styles, shapes),
    )


def _general_cuts(model: Any, styles: Styles, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the general plan would cut a fifth of a model's elements that no style cuts."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    whole = {name: size for name, size in sizes.items() if name not in styles.parameters}
    least = LARGE_SHARE * sum(sizes.values())
    if sum(whole.values()) <= least:
        return False
    cut = general_styles(model)
    return sum(size for name, size in whole.items() if name.rpartition(".")[0] in cut) > least


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

"""Pico models of every family of the installed transformers that has a plan: the numbers that make a model big are
shrunk in its configuration and in nested ones."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from family_tables import FIRST_SPECIAL, LAYER_COUNTS, LAYERS, NESTED, NEVER_NONE, OVERRIDES, SMALL
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

MODEL_TYPES = tuple(sorted(CONFIG_MAPPING_NAMES))
LARGEST = 3_000_000  # parameters of a model still called pico

# The auto classes a family is looked up in, in order.
_TASKS = (
    *("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"),
    *("TEXT_TO_WAVEFORM", "MASKED_LM", "TOKEN_CLASSIFICATION"),
)


def build(model_type: str, *, planned: bool = True) -> Any:
    """Build a random model of the family in fp32, or return None if the family has no plan (if it has one, unless
    `planned`).

    Raises whatever its configuration or class raises: not every family can be shrunk this way.
    """
    if planned and not _may_have_plan(model_type):
        return None
    config = small_config(model_type)
    model_class = _model_class(config)
    if model_class is None:
        return None
    with torch.device("meta"):
        model = model_class._from_config(config)
    if planned and not model.tp_plan and not getattr(model, "ep_plan", None):
        return None
    if not planned and model.tp_plan:
        return None
    if getattr(transformers, model_class.__name__, None) is not model_class:
        raise LookupError(f"transformers does not export {model_class.__name__}")
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters")
    torch.manual_seed(0)
    model = model_class._from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.ndim > 1 else 1 + noise * 0.1)
        for module in model.modules():  # some families zero the pad row when they load
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    return model


def save(model: Any, folder: Path) -> Path:
    """Write the model as a checkpoint of several files."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def small_config(model_type: str) -> Any:
    """Return the family's configuration with small numbers, in nested configurations too."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    overrides = OVERRIDES.get(model_type, {})
    found = _shrink(config_class(**NESTED.get(model_type, {})), {})
    return config_class(**_merge(found, overrides))


def _may_have_plan(model_type: str) -> bool:
    """Whether the default configuration, one nested in it, or a class of the family's module has a plan."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    package = Path(sys.modules[config_class.__module__].__file__ or "").parent
    if any("_tp_plan" in path.read_text() for path in package.glob("modeling_*.py")):
        return True
    try:
        config = config_class()
    except Exception:
        config = config_class
    plans = ("base_model_tp_plan", "base_model_ep_plan")
    return any(getattr(one, plan, None) for one in (config, *_nested(config)) for plan in plans)


def _nested(config: Any) -> Iterator[Any]:
    for value in vars(config).values():
        if isinstance(value, transformers.PreTrainedConfig):
            yield value
            yield from _nested(value)


def _model_class(config: Any) -> Any:
    """Return the class that does most with this configuration: a causal model, a conditional one, …, the base model."""
    listed = []
    for mapping in [f"MODEL_FOR_{task}_MAPPING_NAMES" for task in _TASKS] + ["MODEL_MAPPING_NAMES"]:
        names = getattr(modeling_auto, mapping, {}).get(config.model_type, ())
        listed += [getattr(transformers, name, None) for name in ((names,) if isinstance(names, str) else names)]
    fitting = [found for found in listed if _fits(found, config)]
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    if not fitting and importlib.util.find_spec(module):
        fitting = [found for found in vars(importlib.import_module(module)).values() if _fits(found, config)][::-1]
    return (fitting or listed or [None])[0]  # some families have a sibling's classes


def _fits(found: Any, config: Any) -> bool:
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return is_model and found.config_class is type(config) and not found.__name__.endswith("PreTrainedModel")


def _with_sections(rope: dict[str, Any]) -> dict[str, Any]:
    """Return rope parameters with sections of a head's rotary dims that add up to half of 8."""
    if "rope_type" in rope:
        return {**rope, "mrope_section": [2, 1, 1]}
    return {name: _with_sections(value) if isinstance(value, dict) else value for name, value in rope.items()}


def _has_mrope(config: Any) -> bool:
    """Whether the family's code reads sections, whose defaults fit only its own size."""
    path = Path(sys.modules[type(config).__module__].__file__ or "")
    modeling = path.with_name(path.name.replace("configuration_", "modeling_"))
    return modeling.exists() and '"mrope_section"' in modeling.read_text()


def _shrink(config: Any, special: dict[str, int]) -> dict[str, Any]:
    """Return keyword arguments that shrink a configuration. `special` numbers the special tokens met so far."""
    found: dict[str, Any] = {}
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    for name, value in values.items():
        if isinstance(value, transformers.PreTrainedConfig):
            found[name] = {"model_type": value.model_type, **_chosen(value), **_shrink(value, special)}
        elif name in SMALL and (_is_number(value) or name in NEVER_NONE or (isinstance(SMALL[name], list) and value)):
            found[name] = SMALL[name]
        elif name in SMALL and isinstance(value, list) and all(map(_is_number, value)):
            found[name] = [SMALL[name]] * len(value)
        elif name.endswith(("_token_id", "_token_index")) and _is_number(value):
            found[name] = special.setdefault(name, FIRST_SPECIAL + len(special))
        elif name == "rope_parameters" and isinstance(value, dict) and _has_mrope(config):
            found[name] = _with_sections(value)
    if "qk_rope_head_dim" in found:  # the head's size is the sum of its parts, and every head has its own key
        found["num_key_value_heads"] = found["num_attention_heads"]
    return {**found, **_shorten({**values, **found})}


def _shorten(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fewest layers that include every kind, and the entries of these layers in each list by layer."""
    found: dict[str, Any] = {}
    for name in LAYER_COUNTS:
        count = values.get(name)
        if not _is_number(count) or count <= LAYERS:
            continue
        lists = {
            own: value for own, value in values.items() if isinstance(value, (list, tuple)) and len(value) == count
        }
        kinds = [repr([value[layer] for value in lists.values()]) for layer in range(count)]
        layers = sorted({kind: layer for layer, kind in reversed(list(enumerate(kinds)))}.values())[:6]
        layers = sorted((layers + [layer for layer in range(count) if layer not in layers])[: max(LAYERS, len(layers))])
        found[name] = len(layers)
        found |= {own: [value[layer] for layer in layers] for own, value in lists.items()}
    return found


def _chosen(config: Any) -> dict[str, Any]:
    """Return the fields of a nested configuration that its parent chose: those that are not the class's defaults."""
    try:
        usual = vars(type(config)())
    except Exception:
        return {}
    return {
        name: value
        for name, value in vars(config).items()
        if not name.startswith("_")
        and name in usual
        and isinstance(value, (int, float, str, bool))
        and usual[name] != value
    }


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        nested = isinstance(value, dict) and isinstance(base.get(name), dict)
        merged[name] = _merge(base[name], value) if nested else value
    return merged


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

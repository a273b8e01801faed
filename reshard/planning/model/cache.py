"""The KV cache of a model: what a server needs beside the weights, by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...checkpoint.architecture import KV_GROUPS
from ...sharding.topology import Topology
from .heads import FUSED, KEYS, VALUES, Heads, number_of

__all__ = ["CacheLayer", "cache_layers", "cached_elements"]

_OUTPUTS = ("o_proj", "out_proj", "dense")


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """One layer's keys and values: the `elements` kept for a token by all ranks together, if no rank shares any.

    `heads` are those of the keys; None if every rank keeps all elements. A layer with a `window` keeps that many tokens
    at most.
    """

    elements: int
    heads: Heads | None
    window: int | None


def cache_layers(model: Any, heads: Mapping[str, Heads]) -> tuple[CacheLayer, ...] | None:
    """Find the layers that cache keys and values, as transformers' DynamicCache of the model's configuration does. None
    if that fails: a model of an unusual kind can be cut all the same.

    Multi-head latent attention caches its latents, which every rank needs. Layers that use another layer's cache, and
    layers of linear attention, whose state does not grow, have none. `heads` are those of the model's parameters.
    """
    try:
        return _layers(model, heads)
    except Exception:  # of any kind: this is advice, from code and configurations of every family
        return None


def _layers(model: Any, heads: Mapping[str, Heads]) -> tuple[CacheLayer, ...]:
    windows = _windows(model.config.get_text_config(decoder=True))
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, CacheLayer] = {}
    numbers: set[int] = set()
    for module in decoder.modules():
        layer: Any = getattr(module, "layer_idx", None)
        attention = names[module]
        if layer not in windows or getattr(module, "is_kv_shared_layer", False):
            continue
        elements, projection = _kept(module)
        if elements and not attention.startswith(tuple(f"{name}." for name in found)):
            heads_held = heads.get(f"{attention}.{projection}.weight".lstrip("."))
            found[attention] = CacheLayer(elements, heads_held, windows[layer])
            numbers.add(layer)
    # hrm_text runs through its layers several times, and keeps the tokens of each time.
    runs = len(windows) // len(found) if found and max(windows) > max(numbers) else 1
    return tuple(found.values()) * runs


def cached_elements(layers: Iterable[CacheLayer], topology: Topology, tokens: int | None = None) -> tuple[int, ...]:
    """Return the elements that each rank keeps for a sequence of `tokens`; for one token, if no window is full."""
    kept = [0] * topology.world_size
    for layer in layers:
        size = layer.elements * (1 if tokens is None else min(tokens, layer.window or tokens))
        if layer.heads is None or topology.tp == 1:
            kept = [found + size for found in kept]
            continue
        held = layer.heads.dealt(topology.tp).held(is_query=layer.heads.is_query)
        for rank in range(topology.world_size):
            count = sum(stop - start for start, stop in held[rank // topology.tp_row])
            kept[rank] += size * count // layer.heads.count
    return tuple(kept)


def _windows(config: Any) -> dict[Any, int | None]:
    """Return the window of each layer that keeps keys and values, by its number."""
    from transformers import DynamicCache

    layers = DynamicCache(config=config).layers or [None] * (getattr(config, "num_hidden_layers", None) or 0)
    return {
        number: number_of(layer, "sliding_window")
        for number, layer in enumerate(layers)
        if layer is None or (hasattr(layer, "keys") and type(layer).__name__ != "DummyLayer")
    }


def _kept(module: torch.nn.Module) -> tuple[int, str]:
    """Return the elements that an attention keeps for a token, and the projection that makes them; 0 if it is none."""
    latent = number_of(module, "kv_lora_rank")
    if latent:
        return latent + (number_of(module, "qk_rope_head_dim") or 0), ""
    linear: dict[str, Any] = {name: child for name, child in module.named_children() if hasattr(child, "out_features")}
    key = next((name for name in KEYS if name in linear), None)
    if key:
        value = next((name for name in VALUES if name in linear), key)  # gemma4's values can be its keys
        return linear[key].out_features + linear[value].out_features, key
    fused = next((name for name in FUSED if name in linear), None)
    output = next((linear[name] for name in _OUTPUTS if name in linear), None)
    if fused and output:  # what is no query, as wide as what the output projection takes
        return linear[fused].out_features - output.in_features, fused
    head_dim, groups = number_of(module, "head_dim"), number_of(module, KV_GROUPS)
    if not head_dim or not groups:
        return 0, ""
    heads = number_of(module, "num_key_value_heads") or (number_of(module, "num_heads") or 0) // groups
    return 2 * heads * head_dim, ""

"""Plans by structure: pairs of a module cut by output features and one cut by input features, found by a trace.

What a trace proposes is proved by a second one, of the model as one rank would have it: with the parts of the weights
that a rank has, the forward must do the same operations, on tensors that are smaller where features are cut, and
nowhere else. Code that counts heads itself must be told the rank's number: the attributes of the attention that hold
it are found by the same proof.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from ...strategies.registry import KEY_VALUE
from .general import leaves_that_run, shared_weights
from .names import HEADS
from .pairs import Pair, module_of, pairs_of
from .proof import proved
from .shortened import shortened
from .trace import Task, given, traced, without_memory

__all__ = ["structured_styles"]


def structured_styles(model: Any, allowed: Collection[str]) -> tuple[dict[str, str], str | None]:
    """Return styles of modules and bare parameters that give colwise → rowwise pairs, by name; and, if the forward
    cannot be traced, why. `allowed` are the modules that may be cut. Those that share their weight with another are
    not. Two layers of each kind are looked at, and all of them if the forward fails so."""
    if given(model) is None:
        return {}, "it takes no text"
    shared = {name for names in shared_weights(model) for name in names}
    usable = {name for name in allowed if name not in shared}
    try:
        with shortened(model) as short:
            found = _traced_styles(model, {name for name, _ in model.named_modules() if short.whole(name) in usable})
            return short.everywhere(found, shared), None
    except Exception:  # of any kind, from code of every family: it may count its layers
        pass
    try:
        return _traced_styles(model, usable), None
    except Exception as error:  # the general plan is right without a trace
        return {}, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _traced_styles(model: Any, allowed: Collection[str]) -> dict[str, str]:
    """Return the styles that a trace proves. Raises whatever the forward does."""
    arguments = given(model)
    watched = {name: module for name, module in leaves_that_run(model) if name in allowed}
    if arguments is None or not watched:
        return {}
    task = Task(arguments, watched, frozenset(_numbers_of_heads(model.config)))
    with without_memory(model):
        trace = traced(model, task, dict(_bare(model, allowed)))
        pairs = [pair for pair in pairs_of(trace) if _pair_styles(model, pair)]
        found: dict[str, str] = {}
        for pair in proved(model, task, trace, pairs):
            found |= _pair_styles(model, pair)
        return found


def _numbers_of_heads(config: Any) -> Iterator[int]:
    for part in (config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", {}))):
        for name, value in vars(part).items() if part is not None else ():
            if re.search(r"head(s|_count)?$|mp_num", name) and type(value) is int and value > 1:
                yield value


def _bare(model: nn.Module, allowed: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the vectors that modules hold beside the modules inside them: attention sinks, biases of heads."""
    for name, module in model.named_modules():
        if module._modules and name in allowed:
            for own, parameter in module._parameters.items():
                if parameter is not None and parameter.ndim == 1:
                    yield (f"{name}.{own}" if name else own), parameter


def _pair_styles(model: nn.Module, pair: Pair) -> dict[str, str]:
    """Return the styles of a pair by name; none if there is no style for it."""
    styles = dict.fromkeys(pair.consumers, "rowwise")
    for name, made in pair.producers.items():
        blocks = made.layout.blocks() or ()
        module, own = module_of(model, name)
        if own and len(blocks) > 1:
            return {}
        styles[name] = _producing(module, blocks)
    if not pair.heads:
        return styles
    owners = _owners(pair)
    told = owners and _of_heads(model, pair, owners)
    return styles | told if told else {}


def _producing(module: nn.Module, blocks: tuple[int, ...]) -> str:
    if isinstance(module, nn.Embedding):
        return "local_colwise"
    if len(blocks) < 2:
        return "colwise"
    smallest = min(blocks)
    words = ",".join(str(size // smallest) for size in blocks) if all(size % smallest == 0 for size in blocks) else ""
    sizes = words or ",".join(map(str, blocks))
    return f"packed_colwise[{sizes}]"


def _owners(pair: Pair) -> dict[str, list[str]] | None:
    """Return the smallest module around each consumer that holds producers too, and the producers in it. None if a
    producer is in none of them."""
    found: dict[str, list[str]] = {}
    for consumer in pair.consumers:
        owner = consumer
        while owner:
            owner = owner.rpartition(".")[0]
            inside = f"{owner}." if owner else ""
            near = [name for name in pair.producers if name.startswith(inside)]
            if near:
                found[owner] = near
                break
    held = {name for names in found.values() for name in names}
    return found if held == pair.producers.keys() else None


def _counts_keys(model: nn.Module, pair: Pair, module: str, own: str) -> bool:
    """Whether an attribute counts KV heads, or their features, and not query heads."""
    value = vars(model.get_submodule(module))[own]
    of_keys: set[int] = set()
    of_queries: set[int] = set()
    for name, made in pair.producers.items():
        known = of_keys if name.rpartition(".")[2] in KEY_VALUE else of_queries
        known |= {made.layout.heads or pair.items, *(made.layout.blocks() or ())}
    return value in of_keys and value not in of_queries


def _of_heads(model: nn.Module, pair: Pair, owners: dict[str, list[str]]) -> dict[str, str] | None:
    """Return the style of each module that holds heads: their numbers, and the attributes that count them."""
    counts = sorted(pair.heads)
    if len(counts) > 2 or counts[0] != pair.items or counts[-1] % counts[0]:
        return None
    key_value, query = counts[0], counts[-1]
    for name, made in pair.producers.items():
        shares = name.rpartition(".")[2] in KEY_VALUE
        if key_value != query and (made.layout.heads == key_value) != shares:
            return None
    found = {}
    for owner in owners:
        inside = f"{owner}." if owner else ""
        told = [
            ("kv:" if _counts_keys(model, pair, module, own) else "") + f"{module}.{own}".removeprefix(inside)
            for module, names in pair.scaled.items()
            for own in names
            if f"{module}.".startswith(inside)
        ]
        found[owner] = f"{HEADS}[{','.join([str(query), str(key_value), *sorted(told)])}]"
    return found

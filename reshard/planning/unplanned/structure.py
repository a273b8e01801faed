"""Plans by structure: pairs of a module cut by output features and one cut by input features, found by a trace.

What a trace proposes is proved by a second one, of the model as one rank would have it: with the parts of the weights
that a rank has, the forward must do the same operations, on tensors that are smaller where features are cut, and nowhere
else. Code that counts heads itself must be told the rank's number: the attributes of the attention that hold it are found
by the same proof.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...strategies.registry import KEY_VALUE
from .general import leaves_that_run
from .marks import Stream
from .names import HEADS, wildcard
from .trace import Producer, Trace, given, parameters_replaced, traced, without_memory

__all__ = ["structured_styles"]

_TRIES = 12  # second traces at most


@dataclass(slots=True)
class _Pair:
    """Producers and consumers of one stream. `owner` is the module that holds all of them near a consumer, by consumer.
    `level` says which attributes are told the rank's numbers: none, those that count heads, those that count features
    too."""

    stream: Stream
    producers: dict[str, Producer]
    consumers: list[str]
    level: int = 0
    scaled: dict[str, list[str]] = field(default_factory=dict)  # module → attributes

    @property
    def heads(self) -> set[int]:
        return {made.layout.heads for made in self.producers.values() if made.layout.heads} or (
            {self.items} if self.items != self.features else set()
        )

    @property
    def items(self) -> int:
        return self.stream.root().items

    @property
    def features(self) -> int:
        return min(min(made.layout.blocks() or (0,)) for made in self.producers.values())

    @property
    def local(self) -> int:
        return max(1, self.items // 2)

    def part(self, size: int) -> int:
        return size // self.items * self.local

    def signature(self) -> frozenset[str]:
        return frozenset(map(wildcard, (*self.producers, *self.consumers)))


def structured_styles(model: Any, allowed: Collection[str]) -> dict[str, str]:
    """Return styles of modules and bare parameters that give colwise → rowwise pairs, by name. `allowed` are the modules
    that may be cut. Empty if the forward cannot be traced."""
    arguments = given(model)
    watched = {name: module for name, module in leaves_that_run(model) if name in allowed}
    if arguments is None or not watched:
        return {}
    counts = frozenset(_numbers_of_heads(model.config))
    try:
        with without_memory(model):
            bare = dict(_bare(model, allowed))
            trace = traced(model, arguments, watched, bare, counts)
            pairs = _proved(model, arguments, watched, trace, counts)
            return _styles(model, pairs, set(bare))
    except Exception:  # of any kind, from code of every family: the general plan is right without a trace
        return {}


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


def _pairs(trace: Trace) -> list[_Pair]:
    """Return the streams that end in modules which can be cut by input features, in the order of the forward."""
    found: dict[int, _Pair] = {}
    for name, made in trace.producers.items():
        root = made.stream.root()
        if root.why is None:
            found.setdefault(id(root), _Pair(root, {}, [])).producers[name] = made
    for call in trace.calls:
        root = call.mark.stream.root() if call.mark else None
        if root is not None and id(root) in found and call.fits and call.module not in found[id(root)].consumers:
            found[id(root)].consumers.append(call.module)
    taken: set[str] = set()
    kept = []
    for pair in found.values():
        whole = any(
            call.module in pair.consumers and not (call.mark and call.mark.stream.root() is pair.stream)
            for call in trace.calls
        )
        blocks = [made.layout.blocks() for made in pair.producers.values()]
        regular = all(sizes and all(size % pair.items == 0 for size in sizes) for sizes in blocks)
        mine = {*pair.producers, *pair.consumers}
        if pair.consumers and not whole and regular and pair.items > 1 and not mine & taken:
            taken |= mine
            kept.append(pair)
    return kept


def _proved(
    model: Any, arguments: dict[str, Any], watched: dict[str, nn.Module], trace: Trace, counts: frozenset[int]
) -> list[_Pair]:
    """Return the pairs with which a rank's forward does what the whole one does. Those that stand in the way go."""
    pairs = _pairs(trace)
    for _ in range(_TRIES):
        if not pairs:
            return []
        wrong = _wrong(model, arguments, watched, trace, pairs, counts)
        if wrong is None:
            return pairs
        guilty = {pair.signature() for pair in wrong}
        for pair in pairs:
            if pair.signature() in guilty:
                pair.level += 1
        pairs = [pair for pair in pairs if _told(model, pair)]
    return []


def _told(model: nn.Module, pair: _Pair) -> bool:
    """Find the attributes to tell the rank's numbers at the pair's level. Return False if there is no such level."""
    if pair.level == 0:
        return True
    if pair.level > 2 or not pair.heads:
        return False
    pair.scaled = {}
    features = {size for made in pair.producers.values() for size in made.layout.blocks() or ()}
    for owner in {name.rpartition(".")[0] for name in pair.producers}:
        for name, value in vars(model.get_submodule(owner)).items():
            if type(value) is not int or re.search(r"head_(dim|size)|layer|idx", name):
                continue
            counts = "head" in name or name == "mp_num"
            if (counts and value in pair.heads) or (pair.level == 2 and not counts and value in features):
                pair.scaled.setdefault(owner, []).append(name)
    return pair.level == 2 or bool(pair.scaled)


def _wrong(
    model: Any,
    arguments: dict[str, Any],
    watched: dict[str, nn.Module],
    trace: Trace,
    pairs: list[_Pair],
    counts: frozenset[int],
) -> list[_Pair] | None:
    """Run the forward as a rank would, and return the pairs at fault if it fails or differs; None if it does not."""
    where: list[str] = []
    handles = [module.register_forward_pre_hook(_entering(name, where)) for name, module in model.named_modules()]
    handles += [module.register_forward_hook(_leaving(where)) for _, module in model.named_modules()]
    try:
        with parameters_replaced(list(_changes(model, pairs))):
            mine = traced(model, arguments, watched, {}, counts)
    except Exception:
        return _around(where, pairs)
    finally:
        for handle in handles:
            handle.remove()
    return _differing(trace, mine, pairs)


def _entering(name: str, where: list[str]) -> Any:
    return lambda *_: where.append(name)


def _leaving(where: list[str]) -> Any:
    return lambda *_: where.pop() and None


def _around(where: list[str], pairs: list[_Pair]) -> list[_Pair]:
    """Return the pairs that have a part in the innermost module that failed, or in one around it."""
    for name in reversed(where):
        inside = name + "." if name else ""
        near = [pair for pair in pairs if any(own.startswith(inside) for own in (*pair.producers, *pair.consumers))]
        if near:
            return near
    return pairs


def _changes(model: nn.Module, pairs: list[_Pair]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Yield what a rank has in place of the whole: parts of parameters, and the numbers of its heads."""
    for pair in pairs:
        for name, made in pair.producers.items():
            module, own = _module_of(model, name)
            for key in [own] if own else list(module._parameters):
                parameter = module._parameters[key]
                if parameter is not None:
                    dim = _feature_dim(module, parameter)
                    yield module._parameters, key, _part(parameter, dim, pair.part(parameter.shape[dim]))
            if type(module).__name__ == "Conv1D":
                yield module.__dict__, "nf", pair.part(module.__dict__["nf"])
        for name in pair.consumers:
            module = model.get_submodule(name)
            weight: Any = module._parameters["weight"]
            dim = 0 if type(module).__name__ == "Conv1D" else 1
            yield module._parameters, "weight", _part(weight, dim, pair.part(weight.shape[dim]))
        for owner, names in pair.scaled.items():
            held = vars(model.get_submodule(owner))
            for own in names:
                yield held, own, pair.part(held[own])


def _module_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module of a producer; and, if it is a bare parameter, the module that holds it and its name there."""
    try:
        return model.get_submodule(name), ""
    except AttributeError:
        return model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]


def _feature_dim(module: nn.Module, parameter: torch.Tensor) -> int:
    if parameter.ndim == 1:
        return 0
    return 1 if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D" else 0


def _part(parameter: Any, dim: int, size: int) -> nn.Parameter:
    with torch.no_grad():
        return nn.Parameter(parameter.narrow(dim, 0, size).clone(), requires_grad=False)


def _differing(trace: Trace, mine: Trace, pairs: list[_Pair]) -> list[_Pair] | None:
    """Compare a rank's forward with the whole one, step by step: the same operations, with the same numbers, and shapes
    that are smaller along the cut dims alone."""
    by_stream = {id(pair.stream.root()): pair for pair in pairs}
    seen: list[_Pair] = []
    if len(trace.steps) != len(mine.steps):
        return pairs
    for (name, numbers, shapes), marks, (other, others, theirs) in zip(trace.steps, trace.marks, mine.steps):
        expected = []
        for shape, mark in zip(shapes, marks):
            pair = by_stream.get(id(mark.stream.root())) if mark else None
            if mark and pair:
                seen = [pair]
                shape = (*shape[: mark.dim], _scaled(shape[mark.dim], pair), *shape[mark.dim + 1 :])
            expected.append(shape)
        if (name, numbers, tuple(expected)) != (other, others, theirs):
            return seen or pairs
    return None


def _scaled(size: int, pair: _Pair) -> int:
    return pair.part(size) if size % pair.items == 0 else -1


def _styles(model: nn.Module, pairs: list[_Pair], bare: set[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        styles: dict[str, str] = {}
        for name, made in pair.producers.items():
            blocks = made.layout.blocks() or ()
            module, own = _module_of(model, name)
            if own and len(blocks) > 1:
                break
            styles[name] = _producing(module, blocks)
        else:
            styles |= dict.fromkeys(pair.consumers, "rowwise")
            owners = _owners(pair)
            if pair.heads:
                style = None if owners is None else _of_heads(model, pair, owners)
                if style is None or owners is None:
                    continue
                for owner in owners:
                    styles[owner] = style[owner]
            found |= styles
    return found


def _producing(module: nn.Module, blocks: tuple[int, ...]) -> str:
    if isinstance(module, nn.Embedding):
        return "local_colwise"
    if len(blocks) < 2:
        return "colwise"
    smallest = min(blocks)
    words = ",".join(str(size // smallest) for size in blocks) if all(size % smallest == 0 for size in blocks) else ""
    sizes = words or ",".join(map(str, blocks))
    return f"packed_colwise[{sizes}]"


def _owners(pair: _Pair) -> dict[str, list[str]] | None:
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


def _counts_keys(model: nn.Module, pair: _Pair, module: str, own: str) -> bool:
    """Whether an attribute counts KV heads, or their features, and not query heads."""
    value = vars(model.get_submodule(module))[own]
    of_keys, of_queries = set(), set()
    for name, made in pair.producers.items():
        known = of_keys if name.rpartition(".")[2] in KEY_VALUE else of_queries
        known |= {made.layout.heads or pair.items, *(made.layout.blocks() or ())}
    return value in of_keys and value not in of_queries


def _of_heads(model: nn.Module, pair: _Pair, owners: dict[str, list[str]]) -> dict[str, str] | None:
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

"""The proof of a plan by structure: the forward of a rank does what the whole one does, on its part of the features."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .pairs import Pair, module_of
from .trace import Task, Trace, parameters_replaced, traced

__all__ = ["proved"]

_TRIES = 12  # second traces at most


def proved(model: Any, task: Task, trace: Trace, pairs: list[Pair]) -> list[Pair]:
    """Return the pairs with which a rank's forward does what the whole one does. Those that stand in the way go, and
    the others are looked at without them."""
    for _ in range(_TRIES):
        if not pairs:
            return []
        wrong = _wrong(model, task, trace, pairs)
        if wrong is None:
            return pairs
        guilty = {pair.signature() for pair in wrong}
        for pair in pairs:
            if pair.signature() in guilty:
                pair.level += 1
        pairs = [pair for pair in pairs if _told(model, pair)]
    return []


def _told(model: nn.Module, pair: Pair) -> bool:
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


def _wrong(model: Any, task: Task, trace: Trace, pairs: list[Pair]) -> list[Pair] | None:
    """Run the forward as a rank would, and return the pairs at fault if it fails or differs; None if it does not."""
    where: list[str] = []
    handles = [module.register_forward_pre_hook(_entering(name, where)) for name, module in model.named_modules()]
    handles += [module.register_forward_hook(_leaving(where)) for _, module in model.named_modules()]
    try:
        with parameters_replaced(list(_changes(model, pairs))):
            mine = traced(model, task, {})
    except Exception:  # of any kind, from code of every family: on a part of the weights it may fail anywhere
        if task.left < 0:
            raise
        return _around(where, pairs)
    finally:
        for handle in handles:
            handle.remove()
    return _differing(trace, mine, pairs)


def _entering(name: str, where: list[str]) -> Any:
    return lambda *_: where.append(name)


def _leaving(where: list[str]) -> Any:
    return lambda *_: where.pop() and None


def _around(where: list[str], pairs: list[Pair]) -> list[Pair]:
    """Return the pairs that have a part in the innermost module that failed, or in one around it."""
    for name in reversed(where):
        inside = name + "." if name else ""
        near = [pair for pair in pairs if any(own.startswith(inside) for own in (*pair.producers, *pair.consumers))]
        if near:
            return near
    return pairs


def _changes(model: nn.Module, pairs: list[Pair]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Yield what a rank has in place of the whole: parts of parameters, and the numbers of its heads."""
    for pair in pairs:
        for name in pair.producers:
            module, own = module_of(model, name)
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


def _feature_dim(module: nn.Module, parameter: torch.Tensor) -> int:
    if parameter.ndim == 1:
        return 0
    return 1 if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D" else 0


def _part(parameter: Any, dim: int, size: int) -> nn.Parameter:
    with torch.no_grad():
        return nn.Parameter(parameter.narrow(dim, 0, size).clone(), requires_grad=False)


def _differing(trace: Trace, mine: Trace, pairs: list[Pair]) -> list[Pair] | None:
    """Compare a rank's forward with the whole one, step by step: the same operations, with the same numbers, and shapes
    that are smaller along the cut dims alone."""
    by_stream = {id(pair.stream.root()): pair for pair in pairs}
    seen: list[Pair] = []
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


def _scaled(size: int, pair: Pair) -> int:
    return pair.part(size) if size % pair.items == 0 else -1

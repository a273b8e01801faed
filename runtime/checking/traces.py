"""Inputs and outputs of every module of a model, in the order of one forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

__all__ = ["Moment", "Trace", "record"]


@dataclass(frozen=True, slots=True)
class Moment:
    """The `input` or `output` of a module in its `call`th call, from 0. The model itself has the name "".

    Inputs are as `caller` gives them, before any style's function changes them; outputs are as `caller` gets them.
    """

    module: str
    side: str
    call: int
    caller: str


Trace = dict[Moment, tuple[torch.Tensor, ...]]  # floating tensors, copies


def record(model: nn.Module, inputs: Mapping[str, Any]) -> Trace:
    """Run a forward and keep every moment of it: this takes memory for all inputs and outputs of all modules.

    DTensors are gathered, which is a collective: call it on every rank.
    """
    found: Trace = {}
    running: list[str] = []
    calls: Counter[str] = Counter()

    def enter(name: str, arguments: Any, keywords: Any) -> None:
        caller = running[-1] if running else ""
        found[Moment(name, "input", calls[name], caller)] = _copies((arguments, keywords))
        running.append(name)

    def leave(name: str, output: Any) -> None:
        running.pop()
        caller = running[-1] if running else ""
        found[Moment(name, "output", calls[name], caller)] = _copies(output)
        calls[name] += 1

    handles: list[Any] = []
    for name, module in model.named_modules():
        before = _hook(enter, name)
        handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(lambda _m, _i, output, name=name: leave(name, output)))
    try:
        with torch.inference_mode():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _hook(enter: Any, name: str) -> Any:
    return lambda _module, arguments, keywords: enter(name, arguments, keywords)


def _copies(value: Any) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.detach().clone() for tensor in _tensors(value) if tensor.is_floating_point())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in arguments or an output; a cache is neither a tensor nor a container here."""
    if isinstance(value, DTensor):
        yield value.full_tensor()
    elif isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)

"""A forward of a model without memory: what flows where, and what the same forward does with one rank's part.

Parameters are tensors without memory, and look like those of a CPU; token ids, positions and masks are real, so code
may look at them. What reads values of hidden states cannot be traced.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .experts import is_common
from .flow import carried, flat
from .marks import Layout, Mark, Stream, one_block

__all__ = ["Call", "Producer", "Task", "Trace", "given", "parameters_replaced", "traced", "without_memory"]

_LENGTH, _SIDE = 7, 5  # tokens of the text, and of what a decoder has so far
_UNIFORM = ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
# Operations that move elements, or none: whether there is one depends on how a tensor lies in memory.
_MOVES = ("clone", "view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "alias", "detach", "contiguous")
_MOST = 12_000  # operations; each takes about 0.2 ms. Recurrent layers run one for each token and more


@dataclass(slots=True)
class Producer:
    """A module, or a parameter, whose output features may be cut."""

    stream: Stream
    layout: Layout


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a module: the mark of its input; None if that is whole. `fits` says whether the mark is on the last
    dim, in one block, so that the module's input features may be cut."""

    module: str
    mark: Mark | None
    fits: bool


@dataclass(slots=True)
class Task:
    """What is traced: the `arguments` of the forward, the modules `watched` by name, the numbers of heads that the
    model may have, and how many operations may be followed in all."""

    arguments: Mapping[str, Any]
    watched: Mapping[str, nn.Module]
    counts: frozenset[int]
    left: int = _MOST


@dataclass(slots=True)
class Trace:
    """What a forward did: its `producers` by name, its `calls` in order, and of each operation its name, the numbers it
    was given, and the shapes and marks of what it made."""

    producers: dict[str, Producer] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    steps: list[tuple[str, tuple[Any, ...], tuple[tuple[int, ...], ...]]] = field(default_factory=list)
    marks: list[tuple[Mark | None, ...]] = field(default_factory=list)


class _Watch(TorchDispatchMode):
    """Follow marks through every operation, but for those inside a module that is looked at as a whole."""

    def __init__(self, trace: Trace, task: Task) -> None:
        super().__init__()
        self.trace, self.task = trace, task
        self.inside = 0
        self._held: dict[int, tuple[torch.Tensor, Mark]] = {}  # it holds the tensors, so that no id is used again
        self._uniform: dict[
            int, tuple[torch.Tensor, frozenset[int]]
        ] = {}  # tensors, and the dims they do not vary along

    def mark_of(self, tensor: torch.Tensor) -> Mark | None:
        found = self._held.get(id(tensor))
        return found[1] if found and found[1].stream.root().why is None else None

    def put(self, tensor: torch.Tensor, mark: Mark) -> None:
        self._held[id(tensor)] = (tensor, mark)

    def _is_uniform(self, tensor: torch.Tensor, dim: int) -> bool:
        found = self._uniform.get(id(tensor))
        return tensor.shape[dim] == 1 or (found is not None and dim in found[1])

    def _note_uniform(self, func: Any, name: str, args: Any, out: torch.Tensor) -> None:
        """Note the dims along which a tensor does not vary: it is made of one number, or was expanded."""
        if name in _UNIFORM:
            dims = frozenset(range(out.ndim))
        elif name == "expand":
            ahead = out.ndim - args[0].ndim
            dims = frozenset(d for d in range(out.ndim) if d < ahead or self._is_uniform(args[0], d - ahead))
        elif name in ("_to_copy", "clone", "slice", "alias", "detach"):
            dims = frozenset(d for d in range(out.ndim) if self._is_uniform(args[0], d))
        elif torch.Tag.pointwise in func.tags:
            tensors = [one for one in args if isinstance(one, torch.Tensor)]
            dims = frozenset(
                d
                for d in range(out.ndim)
                if all(d - (out.ndim - t.ndim) < 0 or self._is_uniform(t, d - (out.ndim - t.ndim)) for t in tensors)
            )
        else:
            return
        if dims:
            self._uniform[id(out)] = (out, dims)

    def _forget_uniform(self, written: torch.Tensor) -> None:
        """Forget what was known of a tensor that is written to, and of those that share its memory."""
        memory = written.untyped_storage()._cdata
        shared = [key for key, (tensor, _) in self._uniform.items() if tensor.untyped_storage()._cdata == memory]
        for key in shared:
            del self._uniform[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.task.left -= 1
        if self.task.left < 0:
            raise RuntimeError(f"more than {_MOST:,} operations")
        out = func(*args, **kwargs)
        if self.inside:
            return out
        name = func.overloadpacket.__name__
        if func._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
            self._forget_uniform(args[0])
        elif isinstance(out, torch.Tensor):
            self._note_uniform(func, name, args, out)
        found = carried(func, args, kwargs, out, self.mark_of, self._is_uniform)
        made = out if isinstance(out, (list, tuple)) else [out]
        marks = found if isinstance(found, list) else [found] * len(made)
        tensors = [(one, mark) for one, mark in zip(made, marks) if isinstance(one, torch.Tensor)]
        for tensor, mark in tensors:
            if mark is not None:
                self.put(tensor, mark)
            elif id(tensor) in self._held:
                self._held.pop(id(tensor))  # written over
        if tensors and isinstance(tensors[0][0], FakeTensor) and name not in _MOVES:
            kinds = (int, float) if torch.Tag.pointwise in func.tags else float  # whole numbers may be sizes elsewhere
            numbers = tuple(one for one in flat((args, kwargs)) if isinstance(one, kinds))
            self.trace.steps.append((name, numbers, tuple(tuple(tensor.shape) for tensor, _ in tensors)))
            self.trace.marks.append(tuple(mark for _, mark in tensors))
        return out


def traced(model: nn.Module, task: Task, bare: Mapping[str, torch.Tensor]) -> Trace:
    """Run a forward and follow the features of the watched modules and of the `bare` parameters, by name.

    Raises whatever the forward does, and RuntimeError if it takes too many operations.
    """
    trace, counts = Trace(), task.counts
    watch = _Watch(trace, task)
    for name, parameter in bare.items():
        made = trace.producers[name] = Producer(Stream(parameter.shape[0]), Layout(parameter.shape[0], counts))
        watch.put(parameter, Mark(0, made.stream, made.layout))
    handles = []
    for name, module in task.watched.items():
        handles.append(module.register_forward_pre_hook(_entered(name, watch), with_kwargs=True))
        handles.append(module.register_forward_hook(_left(name, watch, counts), always_call=True))
    try:
        with torch.no_grad(), watch:  # in inference mode, operations arrive that are made of others
            out = model(**task.arguments)
    finally:
        for handle in handles:
            handle.remove()
    for tensor in flat(out):
        mark = watch.mark_of(tensor) if isinstance(tensor, torch.Tensor) else None
        if mark is not None:
            mark.stream.end("the model returns it")
    return trace


def _entered(name: str, watch: _Watch) -> Callable[..., None]:
    def see(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        watch.inside += 1
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        mark = watch.mark_of(tensors[0]) if tensors else None
        fits = mark is not None and mark.dim == tensors[0].ndim - 1 and len(tensors) == 1
        if mark is not None and fits:
            one_block(mark)
        elif mark is not None:
            mark.stream.end(f"{name} runs on each part")
        watch.trace.calls.append(Call(name, mark, fits))

    return see


def _left(name: str, watch: _Watch, counts: frozenset[int]) -> Callable[..., None]:
    def see(_module: nn.Module, _args: tuple, out: Any) -> None:
        watch.inside -= 1
        if isinstance(out, torch.Tensor):
            size = out.shape[-1]
            made = watch.trace.producers.setdefault(name, Producer(Stream(size), Layout(size, counts)))
            watch.put(out, Mark(out.ndim - 1, made.stream, made.layout))

    return see


@contextlib.contextmanager
def without_memory(model: nn.Module) -> Iterator[FakeTensorMode]:
    """Give a model on the meta device parameters and buffers that look like those of a CPU, and have no memory."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
        return made[id(tensor)]

    kept, training = [], model.training
    model.eval()
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            kept.append((held, dict(held)))
            for own, tensor in held.items():
                if tensor is not None:
                    parameter = held is module._parameters
                    held[own] = nn.Parameter(fake(tensor), requires_grad=False) if parameter else fake(tensor)
        if is_common(module):
            module.__dict__["forward"] = _experts_output
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it tells of each error that it raises
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield mode
    finally:
        log.setLevel(level)
        model.train(training)
        for held, before in kept:
            held.update(before)
        for module in model.modules():
            if module.__dict__.get("forward") is _experts_output:
                del module.__dict__["forward"]


def _experts_output(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Stand in for experts, which look at which routes there are: what they return has the shape of what they get."""
    return hidden_states.new_empty(hidden_states.shape)


@contextlib.contextmanager
def parameters_replaced(changes: list[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Put other values into some dicts, by key, for the time being."""
    before = [(held, key, held[key]) for held, key, _ in changes]
    try:
        for held, key, value in changes:
            held[key] = value
        yield
    finally:
        for held, key, value in reversed(before):
            held[key] = value


def given(model: Any) -> dict[str, Any] | None:
    """Return arguments of a forward: a text, perhaps with what a decoder has so far; None if it takes no text."""
    names = inspect.signature(model.forward).parameters
    if "input_ids" not in names:
        return None
    found: dict[str, Any] = {"input_ids": torch.arange(3, 3 + _LENGTH)[None]}
    if "decoder_input_ids" in names:
        found["decoder_input_ids"] = torch.arange(3, 3 + _SIDE)[None]
    if "use_cache" in names:
        found["use_cache"] = False
    return found

"""Methods of one model alone, in place of those of its class."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from reshard.errors import UsageError

__all__ = ["give_method", "keep_tensors"]


def give_method(model: Any, name: str, function: Callable[..., Any]) -> None:
    """Have `model.NAME(…)` call `function(model, …)`; a copy of the model has its own."""
    setattr(model, name, _Method(function, model))


def keep_tensors(model: nn.Module) -> None:
    """Have `model.to(…)`, `.half()` and their like raise UsageError where they would change its parameters, and do
    nothing where they would not.

    They change what stands in `module._parameters`, and the forward would go on with the local tensors.
    """
    for module in model.modules():
        if next(module.parameters(), None) is not None:
            give_method(module, "_apply", _unchanged)


def _unchanged(module: Any, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """In place of `nn.Module._apply`, through which all of them go. Some parameters are kept in fp32 in a model of half
    precision: the first is what `model.dtype` goes by."""
    parameters = list(module.parameters())
    first = next((parameter for parameter in parameters if parameter.is_floating_point()), parameters[0])
    local = first.to_local() if isinstance(first, DTensor) else first
    probe = local.new_empty(0)
    found = fn(probe)
    if (found.dtype, found.device) != (probe.dtype, probe.device):
        raise UsageError(
            f"a loaded model stays {probe.dtype} on {probe.device}".replace("torch.", ""),
            hint="load it with another device, or convert with --dtype",
        )
    return module


class _Method:
    """Bound weakly: a model that held itself would keep its memory until garbage is looked for."""

    def __init__(self, function: Callable[..., Any], model: Any) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._model = weakref.ref(model)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self._function)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._model(), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Method:
        """Of the model that is being copied: that of the copy."""
        return _Method(self._function, memo.get(id(self._model()), self._model()))

"""Methods that are set on one model, in place of its class's."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from reshard.errors import UsageError

__all__ = ["give_method", "given"]


def give_method(model: Any, name: str, function: Callable[..., Any]) -> None:
    """Make `model.NAME(…)` call `function(model, …)`; a copy of the model calls it with the copy."""
    setattr(model, name, _Method(function, model))


def given(model: Any, name: str) -> Any:
    """Return the attribute `name` that `load` set on a model. Raises UsageError if this runtime did not load it."""
    found = getattr(model, name, None)
    if found is None:
        raise UsageError(
            f"this {type(model).__name__} is not a model that was loaded by this runtime",
            hint="give what runtime.load returned",
        )
    return found


class _Method:
    """A function bound to a model by a weak reference: a cycle would keep the memory until garbage is collected."""

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
        """Bind to the copy of the model, if the model is being copied."""
        return _Method(self._function, memo.get(id(self._model()), self._model()))

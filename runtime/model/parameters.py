"""Parameters of a loaded model: DTensors around the very tensors that its modules compute with."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from reshard.errors import UsageError
from reshard.text import printable

__all__ = ["Kept", "LoadedParameter", "face_of"]

_CONVERT = "values can be changed in place (parameter.copy_); for anything else change the checkpoint, and convert that"


class LoadedParameter(DTensor):
    """A parameter over all ranks. Its local tensor is the object that the module's own forward sees, so assigning to
    the `data` of either changes both. torch's DTensor accepts such an assignment, and drops it.
    """

    called: str  # its name in the model

    @property
    def data(self) -> Any:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Any) -> None:
        """Raises UsageError unless `value` is a DTensor of the same shape, dtype and placements, on the same ranks."""
        if not isinstance(value, DTensor) or _layout(value) != _layout(self):
            raise UsageError(
                f"{printable(self.called)}: its data is a DTensor, {self.dtype} of {list(self.shape)} as"
                f" {self.placements}; not a {type(value).__name__}, {value.dtype} of {list(value.shape)}"
                f" as {getattr(value, 'placements', 'one tensor')}",
                hint=_CONVERT,
            )
        self._local_tensor.data = value.to_local()

    @staticmethod
    def __tensor_unflatten__(*parts: Any) -> LoadedParameter:
        """Keep this class in a compiled forward whose module sees the DTensor."""
        made: Any = DTensor.__tensor_unflatten__(*parts)
        return LoadedParameter(made._local_tensor, made._spec, requires_grad=made.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedParameter:
        if id(self) not in memo:
            local = copy.deepcopy(self._local_tensor, memo)
            memo[id(self)] = _loaded(local, self._spec, self.called)
        return memo[id(self)]


def _layout(tensor: DTensor) -> tuple[Any, ...]:
    return tensor.device_mesh, tensor.placements, tensor.shape, tensor.dtype


def _loaded(local: torch.Tensor, spec: Any, name: str) -> LoadedParameter:
    """Make a parameter without `nn.Parameter(tensor)`: that detaches, so DTensor works out the result's sharding for
    each shape, which was half the time of a load. `_is_param` is the mark that `nn.Parameter` sets on such tensors."""
    loaded = LoadedParameter(local, spec, requires_grad=False)
    loaded._is_param = True
    loaded.called = name
    return loaded


def face_of(local: nn.Parameter, distributed: torch.Tensor, name: str) -> Any:
    """Return the public parameter for a module's `local` one: itself, unless `distributed` is a DTensor."""
    return _loaded(local, distributed._spec, name) if isinstance(distributed, DTensor) else local


class Kept(dict):
    """A module's parameters or submodules, by name: none can be replaced, removed or added.

    A replacement (by setting an attribute, pruning, adapters, a larger vocabulary, `functional_call`) would leave out
    the functions of a style, or the other ranks' parts. All of these write to this dict, which raises UsageError.
    """

    def __init__(self, entries: Mapping[str, Any], module: nn.Module, name: str) -> None:
        super().__init__(entries)
        self._module = weakref.ref(module)
        self._name = name
        self._shown = {own: module.__dict__[own] for own in entries if own in module.__dict__}

    def __setitem__(self, own: str, value: Any) -> None:
        module = self._module()
        if module is not None:
            module.__dict__.update(self._shown)  # setting an attribute, nn.Module has dropped it here
        as_shown = value is not None and value is self._shown.get(own)  # a bias may be shown as None although it exists
        if not as_shown and (own not in self or value is not self[own]):
            self._refuse(own)

    def __delitem__(self, own: str) -> None:
        self._refuse(own)

    def pop(self, own: str, *_: Any) -> Any:
        self._refuse(own)

    def setdefault(self, own: str, *_: Any) -> Any:
        self._refuse(own)

    def update(self, *others: Any, **entries: Any) -> None:
        for own, value in dict(*others, **entries).items():
            self[own] = value

    def popitem(self) -> Any:
        self._refuse("")

    def clear(self) -> None:
        self._refuse("")

    def _refuse(self, own: str) -> NoReturn:
        name = ".".join(filter(None, [self._name, own]))
        raise UsageError(f"{printable(name)}: a loaded model keeps its parameters and modules", hint=_CONVERT)

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        module: Any = self._module()
        copied = Kept(copy.deepcopy(dict(self), memo), memo.get(id(module), module), self._name)
        copied._shown = copy.deepcopy(self._shown, memo)
        return copied

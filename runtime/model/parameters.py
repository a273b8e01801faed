"""A loaded model's parameters: DTensors around the very tensors that its modules compute with."""

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
    """A parameter as all ranks hold it. Its local tensor is the one that the module's own forward sees: one object, so
    what is assigned to the `data` of either is seen by both. torch takes such an assignment to a DTensor, and drops it.
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
        """For a compiled forward whose module sees the DTensor: there too it is of this class."""
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
    """Not by `nn.Parameter(tensor)`: it detaches, and DTensor works out for each shape how the result is sharded, which
    was half the time of a load. The mark is what `nn.Parameter` puts on such tensors."""
    loaded = LoadedParameter(local, spec, requires_grad=False)
    loaded._is_param = True
    loaded.called = name
    return loaded


def face_of(local: nn.Parameter, distributed: torch.Tensor, name: str) -> Any:
    """What stands for a module's `local` parameter in `named_parameters`: itself, unless it is `distributed`."""
    return _loaded(local, distributed._spec, name) if isinstance(distributed, DTensor) else local


class Kept(dict):
    """A module's parameters, or the modules in it, by name: none is replaced or removed, and none comes to it.

    Whatever replaces one (an attribute that is set, pruning, adapters, a larger vocabulary, `functional_call`) would
    leave out what a style does around it, or the other ranks' parts. It goes through here, and raises UsageError.
    """

    def __init__(self, entries: Mapping[str, Any], module: nn.Module, name: str) -> None:
        super().__init__(entries)
        self._module = weakref.ref(module)
        self._name = name
        self._shown = {own: module.__dict__[own] for own in entries if own in module.__dict__}

    def __setitem__(self, own: str, value: Any) -> None:
        module = self._module()
        if module is not None:
            module.__dict__.update(self._shown)  # of an attribute that is set, nn.Module has dropped what was there
        as_shown = value is not None and value is self._shown.get(own)  # a bias may be shown as none, and be there
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

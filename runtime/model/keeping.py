"""Guards of a loaded model: it keeps its parameters, modules, dtype and device, and runs inference only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter, is_
from typing import Any, NoReturn

import torch
from torch.distributed.tensor import DTensor

from reshard.errors import UsageError
from reshard.text import printable

from .methods import give_method
from .parameters import Kept

__all__ = ["check_views", "keep_model"]

# Methods of transformers that change a model's parameters, and would do half of that before a module is replaced.
_REFUSED = ("add_adapter", "load_adapter")
_LOCAL = attrgetter("_local_tensor")
_INFERENCE = "a loaded model runs inference only"


def keep_model(model: Any) -> None:
    """Make a model refuse another dtype or device, other parameters or modules, training, and a backward: the ranks
    would have different models, or the forward other tensors than `named_parameters`.

    The forward sees values that are changed in place, and values that are assigned to a parameter's `data`.
    """
    for name, module in model.named_modules():
        if next(module.parameters(), None) is not None:
            give_method(module, "_apply", _unchanged)
        give_method(module, "train", _only_eval)
        give_method(module, "load_state_dict", _in_place)
        if hasattr(module, "resize_token_embeddings"):
            give_method(module, "resize_token_embeddings", _same_vocabulary)
        for method in _REFUSED:
            if hasattr(module, method):
                give_method(module, method, _refusing(method))
        for kind in ("_parameters", "_modules"):
            module.__dict__[kind] = Kept(module.__dict__[kind], module, name)
    model._reshard_views = _Views(model)
    model.register_forward_pre_hook(_check_touched)
    model.register_state_dict_pre_hook(lambda model, *_: check_views(model))
    model.register_forward_hook(_no_backward)


def _unchanged(module: Any, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """Stand in for `nn.Module._apply`, which `.to(…)`, `.half()` and their like call. The first floating parameter is
    tested, since `model.dtype` is its dtype; some parameters of a model in half precision are kept in fp32."""
    parameters = list(module.parameters())
    first = next((parameter for parameter in parameters if parameter.is_floating_point()), parameters[0])
    probe = torch.empty(0, dtype=first.dtype, device=first.device)
    found = fn(probe)
    if (found.dtype, found.device) != (probe.dtype, probe.device):
        raise UsageError(
            f"a loaded model stays {probe.dtype} on {probe.device}".replace("torch.", ""),
            hint="load it with another device, or convert with --dtype",
        )
    return module


def _only_eval(module: Any, mode: bool = True) -> Any:
    """Stand in for `train`: in training, each rank would drop out other elements."""
    if mode:
        raise UsageError(f"{_INFERENCE}: train() is not for it", hint="train the checkpoint, and convert that")
    return type(module).train(module, False)


def _in_place(module: Any, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
    """Stand in for `load_state_dict`, which would list the error of `Kept` once for each parameter."""
    if assign:
        raise UsageError(
            "load_state_dict(assign=True) replaces parameters, and a loaded model keeps them",
            hint="without assign, their values are copied",
        )
    for name, parameter in module.named_parameters(remove_duplicate=False):
        theirs = state_dict.get(name, parameter)
        if isinstance(parameter, DTensor) and not isinstance(theirs, DTensor):
            raise UsageError(
                f"{printable(name)}: a loaded model's is a DTensor, and this state_dict has a {type(theirs).__name__}",
                hint="give what state_dict() of a loaded model gives; values of a checkpoint come by converting that",
            )
    return type(module).load_state_dict(module, state_dict, strict)


def _refusing(method: str) -> Callable[..., NoReturn]:
    def refuse(_model: Any, *_: Any, **__: Any) -> NoReturn:
        raise UsageError(
            f"{method} gives a model other parameters, and a loaded model keeps them",
            hint="do it to the checkpoint in one process, save that, and convert it",
        )

    return refuse


def _same_vocabulary(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
) -> Any:
    """Stand in for `resize_token_embeddings`: many callers pass the size that the model has."""
    size = model.config.get_text_config().vocab_size
    if new_num_tokens not in (None, size) or (pad_to_multiple_of and size % pad_to_multiple_of):
        _refusing("resize_token_embeddings")(model)
    return model.get_input_embeddings()


def check_views(model: Any) -> None:
    """Check that the model's parameters still hold the tensors that its forward computes with.

    Raises UsageError, naming the parameter.
    """
    model._reshard_views.check()


def _check_touched(model: Any, _inputs: Any) -> None:
    """Check the views before a forward if anything was assigned: to find out takes 0.1 µs for a parameter. A compiled
    forward skips this."""
    if not torch.compiler.is_compiling() and model._reshard_views.touched():
        model._reshard_views.check()


class _Views:
    """A model's parameters, and the local tensors that its modules saw when it was loaded. A library lays out its
    quantized weights as it likes."""

    def __init__(self, model: Any) -> None:
        native = model._reshard_quantized.native
        self._parameters = {name: one for name, one in model.named_parameters() if name not in native}
        self._locals = list(map(_local, self._parameters.values()))
        self._layouts = [(local.shape, local.dtype) for local in self._locals]
        self._seen = self._look()
        self._distributed = [one for one in self._parameters.values() if isinstance(one, DTensor)]
        self._theirs = list(map(_LOCAL, self._distributed))

    def _look(self) -> list[int]:
        return [*map(torch.Tensor.data_ptr, self._locals), *map(torch.Tensor.numel, self._locals)]

    def touched(self) -> bool:
        """Whether any parameter has another local tensor, or one at another address or of another size."""
        same = all(map(is_, map(_LOCAL, self._distributed), self._theirs))
        return not same or self._look() != self._seen

    def check(self) -> None:
        for (name, parameter), local, layout in zip(self._parameters.items(), self._locals, self._layouts):
            if _local(parameter) is not local or (local.shape, local.dtype) != layout:
                shape, dtype = layout
                raise UsageError(
                    f"{printable(name)}: the forward computes with another tensor than the parameter holds, or with one"
                    f" that is not {list(shape)}, {dtype}",
                    hint="change its values in place (parameter.copy_)",
                )
        self._seen = self._look()


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return _LOCAL(parameter) if isinstance(parameter, DTensor) else parameter


class _InferenceOnly(torch.autograd.Function):
    """The identity, whose backward raises UsageError."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise UsageError(
            f"{_INFERENCE}: gradients do not pass from rank to rank", hint="train the checkpoint, and convert that"
        )


def _no_backward(model: Any, _inputs: Any, outputs: Any) -> None:
    """If torch records a graph, make its backward raise UsageError at the model's outputs."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    anchor = torch.zeros((), requires_grad=True)
    for tensor in {id(tensor): tensor for tensor in _floating(outputs)}.values():
        _InferenceOnly.apply(tensor, anchor)


def _floating(value: Any) -> Iterator[torch.Tensor]:
    """Yield the floating tensors in a model's output, nested ones too; a cache is not a container here."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (dict, tuple, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _floating(part)

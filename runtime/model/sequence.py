"""Sequence parallelism: between a layer's blocks, each rank holds its slice of the sequence instead of all hidden
states. Norms and the residual stream run on the slice; the slices are joined in front of each block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from reshard.errors import BadInputError
from reshard.strategies import (
    AllReduceParallel,
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    SplitSequence,
    TensorParallelLayer,
    follow,
)
from reshard.strategies.registry import ParallelInterface
from reshard.text import printable

__all__ = ["SplitPoints", "split_points", "split_sequence"]

# Arguments that a decoder uses before its first layer. Any other argument with tensors could meet the hidden states
# between two layers.
_BEFORE_LAYERS = {
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position"),
    *("cache", "past_key_values"),  # transformers renamed it in 5.24
}

# Decoders, by model type, whose layers handle more than the hidden states between their blocks.
_MORE_BETWEEN = {
    "neomme": "mix what the first layer was given into what they are given",
    **dict.fromkeys(("bloom", "mpt"), "add the hidden states in front of a block inside it"),
    "qwen4_exp_text": "keep several streams side by side, which blocks split and join",
}


@dataclass(frozen=True, slots=True)
class SplitPoints:
    """The modules, by name, where a model's sequence is split and joined.

    It is split in front of the `first` layer and joined behind `last`: the norm after the layers, or the last layer.
    Each of `blocks` (attention, MLP) gets the full sequence. Its value is the module whose sum over the ranks is the
    block's output, or None if the block's output is replicated and then cut. `followers` are modules whose style would
    otherwise split the sequence by itself.
    """

    decoder: str
    first: str
    last: str
    blocks: dict[str, str | None]
    followers: tuple[str, ...]


def split_points(model: Any, hooks: Mapping[str, str], strategies: ParallelInterface) -> SplitPoints:
    """Find the split points of a model whose modules have the styles `hooks`.

    A layer must consist of norms and dropouts, which work on each token by itself, and of blocks whose styles make
    their output replicated. Whatever else a layer does with its hidden states cannot be known.

    Raises BadInputError if a layer has anything else, and names it.
    """
    names = {module: name for name, module in model.named_modules()}
    decoder = model.get_decoder()
    stacks = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child)]
    if model.config.is_encoder_decoder or len(stacks) != 1:
        _refuse(f"{type(model).__name__} is not a decoder with one stack of layers")
    kind = getattr(decoder.config, "model_type", "")
    if kind in _MORE_BETWEEN:
        _refuse(f"layers of {kind} {_MORE_BETWEEN[kind]}")
    known = {name: strategies.find(style) for name, style in hooks.items()}
    custom = strategies.custom(set(hooks.values()))
    blocks: dict[str, str | None] = {}
    followers: list[str] = []
    for layer in stacks[0]:
        if names[layer] in known:
            _refuse(f"{names[layer]} has a style of its own, {hooks[names[layer]]}")
        for child in layer.children():
            name = names[child]
            inside = {at: style for at, style in known.items() if at == name or at.startswith(f"{name}.")}
            own = [at for at in inside if hooks[at] in custom]
            if own:
                _refuse(f"{own[0]} has a style that is not built in, {printable(hooks[own[0]])}")
            if _is_tokenwise(child) and set(inside) <= {name}:
                followers += [at for at, style in inside.items() if isinstance(style, SequenceParallel)]
            else:
                blocks[name] = _reduction(name, inside)
    norms = [child for child in decoder.children() if _is_tokenwise(child) and _is_norm(child)]
    last = norms[0] if len(norms) == 1 else stacks[0][-1]
    if isinstance(known.get(names[last]), SequenceParallel):
        followers.append(names[last])
    return SplitPoints(names[decoder], names[stacks[0][0]], names[last], blocks, tuple(followers))


def _refuse(reason: str) -> NoReturn:
    raise BadInputError(
        f"sequence parallelism: {reason}", hint="load it without: only activations take more memory then"
    )


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by its class's name: every family has a class of its own."""
    return "norm" in type(module).__name__.lower()


def _is_tokenwise(module: nn.Module) -> bool:
    alone = next(module.children(), None) is None
    return alone and (_is_norm(module) or isinstance(module, (nn.Dropout, nn.Identity)))


def _reduction(block: str, styles: Mapping[str, TensorParallelLayer]) -> str | None:
    """Return the module that sums a block's output over the ranks, if there is one and it is the block's last."""
    sums = [at for at, style in styles.items() if isinstance(style, (RowwiseParallel, AllReduceParallel))]
    joins = [
        at
        for at, style in styles.items()
        if isinstance(style, ColwiseParallel) and style.output_layouts[0].is_replicate()
    ]
    if not sums and not joins:
        _refuse(f"{block} is neither a norm nor a block whose style makes its output whole")
    alone = len(sums) == 1 and isinstance(styles[sums[0]], RowwiseParallel)
    return sums[0] if alone and sums[0].rpartition(".")[0] == block else None


def split_sequence(model: nn.Module, points: SplitPoints, mesh: DeviceMesh) -> list[Any]:
    """Split the sequence over `mesh`, the tp axis, from the first layer to the last. The styles are installed already.

    A forward is not split if it has fewer tokens than ranks, as a step of decoding has, if it is asked for hidden
    states, or if it is given tensors that layers could use (`deepstack_visual_embeds`). Every rank decides alike.
    Returns the handles; `remove()` undoes each.
    """
    sequence = SplitSequence(mesh)
    modules = dict(model.named_modules())
    for name in (*points.followers, *filter(None, points.blocks.values())):
        follow(modules[name], sequence)
    wanted = _Wanted(sequence)
    decoder, first, last = modules[points.decoder], modules[points.first], modules[points.last]
    handles: list[Any] = [
        decoder.register_forward_pre_hook(wanted.ask, with_kwargs=True, prepend=True),
        first.register_forward_pre_hook(wanted.split, with_kwargs=True, prepend=True),
    ]
    for name, summed in points.blocks.items():
        behind = sequence.checked if summed else sequence.part
        handles.append(modules[name].register_forward_pre_hook(_before(sequence), with_kwargs=True, prepend=True))
        handles.append(modules[name].register_forward_hook(_behind(sequence, behind)))
    handles.append(last.register_forward_hook(_behind(sequence, sequence.end)))
    handles.append(decoder.register_forward_hook(wanted.joined))
    return handles


class _Wanted:
    """Whether the forward under way may split its sequence."""

    def __init__(self, sequence: SplitSequence) -> None:
        self._sequence = sequence
        self._wanted = False

    def ask(self, decoder: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self._sequence.length = None  # a failed forward may have left one
        hidden = kwargs.get("output_hidden_states", getattr(decoder.config, "output_hidden_states", None))
        met = [name for name, value in kwargs.items() if name not in _BEFORE_LAYERS and _has_tensors(value)]
        self._wanted = not hidden and not met

    def joined(self, *_: Any) -> None:
        assert self._sequence.length is None, "the sequence was split in front of the layers, and not joined behind"

    def split(self, _layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not self._wanted or self._sequence.length is not None:  # a model may run through its layers twice
            return None
        return _with_hidden_states(self._sequence.begin, args, kwargs)


def _has_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_tensors, value))
    return _has_tensors(list(value.values())) if isinstance(value, dict) else isinstance(value, torch.Tensor)


def _with_hidden_states(change: Callable[[Any], Any], args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def _before(sequence: SplitSequence) -> Callable[..., Any]:
    def gather(_block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        return None if sequence.length is None else _with_hidden_states(sequence.whole, args, kwargs)

    return gather


def _behind(sequence: SplitSequence, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def changed(_module: nn.Module, _args: tuple, outputs: Any) -> Any:
        if sequence.length is None:
            return outputs
        return (change(outputs[0]), *outputs[1:]) if isinstance(outputs, tuple) else change(outputs)

    return changed

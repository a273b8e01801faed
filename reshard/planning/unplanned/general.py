"""The general plan: every linear layer, convolution and embedding is cut by output features, and its output gathered.

This is right for any module: what a module gives to the code around it is what it gives in one process. It costs one
gather for each such module, of its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from .readers import leaf_forward, read_elsewhere

__all__ = ["can_be_cut", "general_styles", "leaves_that_run", "shared_weights"]

_LEAST = 16  # output features that are worth a cut
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Classes that hold several linear layers in one weight, of which each input takes one: output features at dim 1, or 2.
_SEVERAL = {"JetMoeParallelExperts": "colwise_gather_output", "CsmCodebooksHead": "conv1d_colwise_gather_output"}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def general_styles(model: nn.Module) -> dict[str, str]:
    """Return the style of each module that can be cut by output features, by name.

    A module is left whole if its weight is read by other code than its own forward, if it has fewer than 16 output
    features, if a convolution has groups, or if it shares its weight with a module that is left whole. An embedding
    that shares its weight with a linear layer is cut over the vocabulary, as that is.
    """
    elsewhere = read_elsewhere(model)
    found = {name: _style(module) for name, module in _leaves(model) if name not in elsewhere}
    styles = {name: style for name, style in found.items() if style}
    for names in shared_weights(model):
        kinds = {styles.get(name) for name in names}
        if None in kinds:
            for name in names:
                styles.pop(name, None)
        elif len(kinds) > 1:
            styles |= _as_one(model, names)
    return styles


def can_be_cut(module: nn.Module) -> bool:
    """Whether a module is of a kind that the general plan cuts."""
    return "weight" in module._parameters and _style(module) is not None


def leaves_that_run(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear layers and embeddings, by name, whose forward alone reads their weight."""
    elsewhere = read_elsewhere(model)
    for name, module in _leaves(model):
        linear = isinstance(module, nn.Linear) and leaf_forward(module, nn.Linear) == "plain"
        table = isinstance(module, nn.Embedding) and leaf_forward(module, nn.Embedding) is not None
        if name not in elsewhere and (linear or table or type(module).__name__ == "Conv1D"):
            yield name, module


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if "weight" in module._parameters and not module._modules:
            yield name, module


def _style(module: nn.Module) -> str | None:
    weight: Any = module._parameters["weight"]
    if isinstance(module, nn.Linear):
        fits = leaf_forward(module, nn.Linear) == "plain" and module.out_features >= _LEAST
        return "colwise_gather_output" if fits else None
    if isinstance(module, nn.Embedding):
        fits = leaf_forward(module, nn.Embedding) is not None and module.max_norm is None
        return "embedding_colwise" if fits and weight.shape[1] >= _LEAST else None
    if type(module).__name__ == "Conv1D":  # transformers.pytorch_utils.Conv1D, which GPT-2 and its kin use
        return "conv1d_colwise_gather_output" if weight.shape[1] >= _LEAST else None
    if type(module).__name__ in _SEVERAL:
        return _SEVERAL[type(module).__name__]
    for kinds, style in ((_CONVOLUTIONS, "conv_colwise"), (_TRANSPOSED, "conv_transposed_colwise")):
        for kind in kinds:
            if isinstance(module, kind):
                fits = module.groups == 1 and module.out_channels >= _LEAST
                return f"{style}_gather_output" if fits and leaf_forward(module, kind) == "plain" else None
    return None


def shared_weights(model: nn.Module) -> Iterator[list[str]]:
    """Yield the names of the modules that share a weight."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    sets: dict[str, set[str]] = {}
    for pair in tied.items():
        joined = set().union(*(sets.get(name, {name}) for name in pair))
        sets |= dict.fromkeys(joined, joined)
    for names in {id(names): names for names in sets.values()}.values():
        modules = sorted(name.removesuffix(".weight") for name in names if name.endswith(".weight"))
        if modules:
            yield modules


def _as_one(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Return styles that cut the shared weight of some modules alike, over its first dim: the vocabulary."""
    found = {}
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            if leaf_forward(module, nn.Embedding) not in ("plain", "same"):
                return {}
            found[name] = "embedding_rowwise"
        elif isinstance(module, nn.Linear):
            found[name] = "colwise_gather_output"
        else:
            return {}
    return found

"""torchao: plain linear layers whose weight is a tensor of its own. The metadata of the source files say which.

Source: `transformers.integrations.torchao`. Tensors that quantize activations too are not computed with here: they do
it for each token, over all inputs, and a rank has a part of these.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..interface import Held, Library, Place, mark_quantized

__all__ = ["LIBRARIES"]

_OF_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization", "act_pre_scale", "act_quant_scale")


def _told(place: Place) -> dict[str, Any]:
    """Return what the source files say of a weight."""
    return json.loads(place.metadata()[place.source])


def _refusal(place: Place, device: torch.device) -> str | None:
    try:
        told = _told(place)["_data"]
        dtype = told["dtype"]["_data"]
    except (KeyError, TypeError, ValueError):
        return "the source files do not describe it"
    if any(told.get(key) is not None for key in _OF_ACTIVATIONS):
        return "it quantizes activations for each token, over all inputs"
    if place.quantized.options["kind"] != "Int8Tensor" and dtype != place.target.dtype:
        return f"torchao computes with it in {dtype}, and the model in {place.target.dtype}"
    return None


def _replace(model: Any, places: Mapping[str, Place], told: Mapping[str, Any], device: torch.device) -> None:
    mark_quantized(model, told)


def _fill(module: Any, held: Held) -> None:
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    place = held.place
    name, told = place.source, _told(place)
    columns = held.options["block"][1]
    told["_data"]["block_size"] = [held.options["block"][0], min(columns, place.local[1])]
    told["_data"]["dtype"]["_data"] = place.target.dtype
    layer = name.rpartition(".")[0]
    parts = {layer + role: tensor for role, tensor in held.tensors.items()}
    told["_tensor_data_names"] = [role.removeprefix("._weight_") for role in held.tensors]
    whole, _ = unflatten_tensor_state_dict(parts, {name: json.dumps(told), "tensor_names": json.dumps([name])})
    module._parameters["weight"] = nn.Parameter(whole[name], requires_grad=False)


def _tensors(module: Any) -> Iterator[torch.Tensor]:
    weight = module._parameters["weight"]
    names = (*weight.tensor_data_names, *getattr(weight, "optional_tensor_data_names", ()))
    yield from (tensor for tensor in (getattr(weight, name) for name in names) if tensor is not None)


LIBRARIES = (
    Library(
        name="torchao",
        extra="torchao",
        packages=("torchao",),
        formats=frozenset({"torchao"}),
        refusal=_refusal,
        replace=_replace,
        fill=_fill,
        tensors=_tensors,
    ),
)

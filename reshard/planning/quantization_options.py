"""The options of quantizing: transformers' own configuration of a kind."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UsageError
from ..text import printable

__all__ = ["configuration_of"]


def configuration_of(kind: str, options: Mapping[str, Any]) -> Any:
    """Return transformers' own configuration of a kind. Raises UsageError, which names what is wrong."""
    from transformers import BitsAndBytesConfig, FineGrainedFP8Config

    family: Any = FineGrainedFP8Config if kind == "fp8" else BitsAndBytesConfig
    every: dict[str, dict[str, Any]] = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        "int8": {"load_in_8bit": True},
        "fp8": {},
    }
    fixed = every[kind]
    own = {
        "quant_method": "fp8" if kind == "fp8" else "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": False,
        **fixed,
    }
    names = inspect.signature(family).parameters.keys() - {"kwargs"}
    given = {}
    for name, value in options.items():
        if name in own:
            if value != own[name]:
                raise UsageError(f"--quantize {kind}: {name} is {printable(value)} in the configuration")
        elif name not in names and not name.startswith("_load_in"):
            raise UsageError(
                f"--quantize {kind}: {printable(name)} is no option of {family.__name__}",
                hint=f"it has {', '.join(sorted(names))}",
            )
        elif name in names:
            given[name] = value
    for name, value in given.items():
        is_dtype = name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage") and isinstance(value, str)
        if is_dtype and not hasattr(torch, value):
            raise UsageError(f"--quantize {kind}: {name} is {printable(value)}, which is no dtype of torch")
    try:
        return family(**fixed, **given)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"--quantize {kind}: {printable(error)}") from None

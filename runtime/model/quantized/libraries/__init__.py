"""The libraries, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..interface import Library, Place
from . import bitsandbytes, gptqmodel, torchao

__all__ = ["BY_FORMAT", "LIBRARIES", "replace_modules"]

LIBRARIES: tuple[Library, ...] = (*bitsandbytes.LIBRARIES, *gptqmodel.LIBRARIES, *torchao.LIBRARIES)

BY_FORMAT = {form: library for library in LIBRARIES for form in library.formats}


def replace_modules(model: Any, places: Mapping[str, Place], told: Mapping[str, Any], device: torch.device) -> None:
    """Put the libraries' modules in the place of plain ones, by the names of these. `told` is the quantization_config
    of config.json."""
    for library in LIBRARIES:
        own = {name: place for name, place in places.items() if place.quantized.format in library.formats}
        if own:
            library.replace(model, own, told, device)

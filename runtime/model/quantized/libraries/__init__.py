"""The libraries, one file each."""

from __future__ import annotations

from ..library import Library
from . import bitsandbytes, gptqmodel, torchao

__all__ = ["BY_FORMAT", "LIBRARIES"]

LIBRARIES: tuple[Library, ...] = (*bitsandbytes.LIBRARIES, *gptqmodel.LIBRARIES, torchao.LIBRARY)

BY_FORMAT = {form: library for library in LIBRARIES for form in library.formats}

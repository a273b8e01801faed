"""The packages whose own modules can compute with quantized weights on ranks. No torch."""

from __future__ import annotations

__all__ = ["LIBRARY_OF"]

# By the manifest's word for a format.
LIBRARY_OF = {
    "awq": "gptqmodel",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "gptq": "gptqmodel",
    "torchao": "torchao",
}

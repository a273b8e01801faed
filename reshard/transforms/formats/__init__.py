"""The formats of quantization, one file each, or one for those of one library."""

from __future__ import annotations

from ..dequantise import Format
from . import awq, bitsandbytes, compressed_tensors, fbgemm, fp8, gptq, modelopt, mxfp4, torchao

__all__ = ["BY_METHOD", "FORMATS"]

_MODULES = (awq, bitsandbytes, compressed_tensors, fbgemm, fp8, gptq, modelopt, mxfp4, torchao)

# The formats of each `quant_method` of a config.json.
BY_METHOD: dict[str, tuple[Format, ...]] = {method: module.FORMATS for module in _MODULES for method in module.METHODS}
# By the manifest's name.
FORMATS: dict[str, Format] = {form.name: form for module in _MODULES for form in module.FORMATS}

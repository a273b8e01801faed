"""What a config.json says of quantized weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import BadInputError

__all__ = ["COMPUTE", "QUANTIZATIONS", "quantization_of", "without_quantization"]

QUANTIZATIONS = ("nf4", "fp4", "int8", "fp8")  # the kinds that checkpoints are quantized to here
COMPUTE = ("auto", "native", "dequantised")  # what may compute with quantized weights on ranks
_KEY = "quantization_config"


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the `quantization_config` of a configuration, or of its text model's; None if there is none.

    Raises BadInputError if it is no JSON object.
    """
    for one in (config, config.get("text_config")):
        if isinstance(one, dict) and one.get(_KEY) is not None:
            found = one[_KEY]
            if not isinstance(found, dict):
                raise BadInputError("config.json: quantization_config is not an object")
            return found
    return None


def without_quantization(config: Any) -> Any:
    """Take it out of a model's configuration, and of those of its parts, so that the model is built with plain layers.
    Returns the configuration."""
    names = config.sub_configs if isinstance(config.sub_configs, dict) else ()  # a config.json may say anything
    for part in (config, *(getattr(config, name, None) for name in names if isinstance(name, str))):
        getattr(part, "__dict__", {}).pop(_KEY, None)
    return config

"""Whether a folder and the installed transformers agree about which modules are quantized."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import nn

from reshard.checkpoint.naming import renamed_modules
from reshard.errors import BadInputError, IntegrityError, VersionError
from reshard.resharded.manifest import Manifest
from reshard.text import listed
from reshard.transforms.formats import FORMATS

__all__ = ["check_quantized"]

# Formats of which transformers quantizes all linear layers, or all fused experts, but those that a list of the
# configuration leaves out.
_LINEAR_BY_LIST = {"awq", "bitsandbytes_4bit", "bitsandbytes_8bit", "fbgemm_fp8", "fp8", "torchao"}
_EXPERTS_BY_LIST = {"fp8", "mxfp4"}
_BY_LIBRARY = {"compressed", "compressed_packed", "compressed_fp4"}  # of compressed-tensors, where it is installed
_LISTS = ("modules_to_not_convert", "llm_int8_skip_modules")


def check_quantized(manifest: Manifest, model: nn.Module, quantization: Mapping[str, Any] | None) -> None:
    """Check that a model on the meta device can have the folder's quantized parameters. `quantization` is that of
    config.json.

    Raises:
        VersionError: this release does not know a format.
        BadInputError: no transformers can run a format.
        IntegrityError: the installed transformers takes other modules of the configuration for quantized.
    """
    forms = {bundle.quantized.format for bundle in manifest.bundles}
    if unknown := sorted(forms - FORMATS.keys()):
        raise VersionError(f"quantized as {listed(unknown)}, which this release does not know", hint="upgrade reshard")
    if refused := sorted(name for name in forms if not FORMATS[name].runs):
        raise BadInputError(f"quantized as {listed(refused)}, which transformers cannot run: for other engines only")
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    experts = {name for name, _ in model.named_modules() if name.endswith(".experts")}
    told = quantization or {}
    if forms and forms <= _BY_LIBRARY:
        looked_at, expected = linear, _targeted(model, told)
    else:
        looked_at = (linear if forms <= _LINEAR_BY_LIST else set()) | (experts if forms <= _EXPERTS_BY_LIST else set())
        expected = _not_left_out(model, looked_at, told, forms)
    found = {bundle.target.name.rpartition(".")[0] for bundle in manifest.bundles}
    if forms and expected is not None and (wrong := sorted((expected ^ found) & looked_at)):
        raise IntegrityError(
            f"by config.json, transformers takes other modules for quantized than the checkpoint has: {listed(wrong)}",
            hint=f"mend {'ignore' if forms <= _BY_LIBRARY else _LISTS[0]} in the quantization_config of the"
            " checkpoint, and convert it again",
        )


def _not_left_out(model: nn.Module, names: Iterable[str], told: Mapping[str, Any], forms: Container[str]) -> set[str]:
    """Return the modules that transformers quantizes, of all that it could."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = next((told[key] for key in _LISTS if told.get(key) is not None), None)
    if skipped is not None:
        skipped = [*skipped, *renamed_modules(model, skipped)]
    left_out = HfQuantizer.get_modules_to_not_convert(
        model, skipped, model._keep_in_fp32_modules, add_default_skips="awq" in forms
    )
    return {name for name in names if should_convert_module(name, left_out)}


def _targeted(model: nn.Module, told: Mapping[str, Any]) -> set[str] | None:
    """Return the modules that compressed-tensors quantizes for transformers; None if the library is not installed."""
    try:
        from compressed_tensors.utils.match import match_named_modules
    except ImportError:
        return None
    targets = [
        target for group in told["config_groups"].values() if group.get("weights") for target in group["targets"]
    ]
    return {name for name, _ in match_named_modules(model, targets, told.get("ignore"))}

"""What every rank holds of the causal models without a plan, at the widths of their default configurations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import families
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from reshard.planning.cuts import does_cut
from reshard.planning.model.rules import expand, model_rules
from reshard.strategies.registry import ALL_PARALLEL_STYLES

MOST = 0.2  # of a model's elements


def shares(model_types: Iterable[str]) -> Iterator[tuple[str, float]]:
    """Yield the part of the elements that no rule cuts, for each causal model of these. Without memory."""
    for model_type in model_types:
        if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            yield model_type, _uncut(_model(model_type))


def _model(model_type: str) -> Any:
    """Build a model as its configuration has it by default, or the small one if it has no such."""
    small = families.small_config(model_type)
    with torch.device("meta"):
        try:
            return families._model_class(small)._from_config(transformers.CONFIG_MAPPING[model_type]())
        except Exception:  # of any kind, from the code of every family
            return families._model_class(small)._from_config(small)


def _uncut(model: Any) -> float:
    styles = expand(model, model_rules(model, "auto").styles, {}).parameters
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    cut = sum(
        size
        for name, size in sizes.items()
        if name in styles
        and (styles[name] == "interleaved_rowwise" or does_cut(ALL_PARALLEL_STYLES.find(styles[name])))
    )
    return 1 - cut / sum(sizes.values())

"""Strategies: one class for each tensor-parallel style. It says how parameters are cut, and what runs at run time.

To add your own, subclass `TensorParallelLayer` and register an instance on `ALL_PARALLEL_STYLES` under its name.
Names are imported when first used, so that importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import LocalLayer, TensorParallelLayer
    from .collectives import group_of
    from .embedding import EmbeddingColwiseParallel, EmbeddingRowwiseParallel
    from .experts import (
        AllReduceParallel,
        ExpertsDispatchParallel,
        ExpertShardParallel,
        InterleavedParallel,
        MoeExpertsParallel,
        MoeIdentityParallel,
    )
    from .heads import HeadsParallel
    from .linear import (
        ColwiseParallel,
        Conv1DColwiseParallel,
        Conv1DPackedColwiseParallel,
        Conv1DRowwiseParallel,
        ConvolutionParallel,
        PackedColwiseParallel,
        PackedRowwiseParallel,
        RowwiseParallel,
    )
    from .registry import ALL_PARALLEL_STYLES, ParallelInterface, load_strategies
    from .sequence import SequenceParallel, SplitSequence, follow
    from .shards import as_dtensor, get_packed_weights, get_tensor_shard, rows_of, take, torch_placement

__all__ = [
    "ALL_PARALLEL_STYLES",
    "AllReduceParallel",
    "ColwiseParallel",
    "Conv1DColwiseParallel",
    "Conv1DPackedColwiseParallel",
    "Conv1DRowwiseParallel",
    "ConvolutionParallel",
    "EmbeddingColwiseParallel",
    "EmbeddingRowwiseParallel",
    "ExpertShardParallel",
    "ExpertsDispatchParallel",
    "HeadsParallel",
    "InterleavedParallel",
    "LocalLayer",
    "MoeExpertsParallel",
    "MoeIdentityParallel",
    "PackedColwiseParallel",
    "PackedRowwiseParallel",
    "ParallelInterface",
    "RowwiseParallel",
    "SequenceParallel",
    "SplitSequence",
    "TensorParallelLayer",
    "as_dtensor",
    "follow",
    "get_packed_weights",
    "get_tensor_shard",
    "group_of",
    "load_strategies",
    "rows_of",
    "take",
    "torch_placement",
]

_HOMES = {
    "LocalLayer": "base",
    "TensorParallelLayer": "base",
    "group_of": "collectives",
    "ConvolutionParallel": "linear",
    "EmbeddingColwiseParallel": "embedding",
    "EmbeddingRowwiseParallel": "embedding",
    "AllReduceParallel": "experts",
    "ExpertsDispatchParallel": "experts",
    "ExpertShardParallel": "experts",
    "InterleavedParallel": "experts",
    "MoeExpertsParallel": "experts",
    "MoeIdentityParallel": "experts",
    "HeadsParallel": "heads",
    "ColwiseParallel": "linear",
    "Conv1DColwiseParallel": "linear",
    "Conv1DPackedColwiseParallel": "linear",
    "Conv1DRowwiseParallel": "linear",
    "PackedColwiseParallel": "linear",
    "PackedRowwiseParallel": "linear",
    "RowwiseParallel": "linear",
    "ALL_PARALLEL_STYLES": "registry",
    "ParallelInterface": "registry",
    "load_strategies": "registry",
    "SequenceParallel": "sequence",
    "SplitSequence": "sequence",
    "follow": "sequence",
    "as_dtensor": "shards",
    "get_packed_weights": "shards",
    "get_tensor_shard": "shards",
    "rows_of": "shards",
    "take": "shards",
    "torch_placement": "shards",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

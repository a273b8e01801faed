"""Strategies: one class for each tensor-parallel style. It says how parameters are cut, and what runs at run time.

To add your own, subclass `TensorParallelLayer` and register an instance on `ALL_PARALLEL_STYLES` under its name.
"""

from __future__ import annotations

from .base import LocalLayer, TensorParallelLayer
from .collectives import group_of
from .embedding import EmbeddingColwiseParallel, EmbeddingRowwiseParallel
from .experts import (
    AllReduceParallel,
    ExpertsDispatchParallel,
    ExpertShardParallel,
    MoeExpertsParallel,
    MoeIdentityParallel,
)
from .linear import (
    ColwiseParallel,
    Conv1DColwiseParallel,
    Conv1DRowwiseParallel,
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
    "Conv1DRowwiseParallel",
    "EmbeddingColwiseParallel",
    "EmbeddingRowwiseParallel",
    "ExpertShardParallel",
    "ExpertsDispatchParallel",
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

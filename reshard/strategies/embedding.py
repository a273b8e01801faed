"""Embeddings: cut over the vocabulary, or over the hidden size. Token ids are replicated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate

from ..sharding import placement as plan
from ..sharding.placement import Placement
from .base import LocalLayer, bounds_of
from .collectives import all_reduce
from .linear import ColwiseParallel

__all__ = ["EmbeddingColwiseParallel", "EmbeddingRowwiseParallel"]


class EmbeddingRowwiseParallel(LocalLayer):
    """Vocabulary-parallel: weight `Shard(0)`; ids of other ranks look up row 0 and count as zero in the sum.

    An id that no rank has is looked up unmasked, so that torch refuses it on every rank, as it does in one process.
    """

    def placement(self, param_type: str, shape: Sequence[int]) -> Placement:
        return plan.Shard(0) if shape else plan.Replicate()

    @staticmethod
    def _prepare_input_fn(
        input_layouts: Any, desired_input_layouts: Any, mod: nn.Module, inputs: tuple, device_mesh: DeviceMesh
    ) -> tuple:
        start, stop = bounds_of(mod, mod.num_embeddings, device_mesh)[device_mesh.get_local_rank()]
        ids = inputs[0]
        elsewhere = ((ids >= 0) & (ids < start)) | ((ids >= stop) & (ids < mod.num_embeddings))
        mod._ids_elsewhere = elsewhere
        return ((ids - start).masked_fill(elsewhere, 0), *inputs[1:])

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        outputs = outputs.masked_fill(mod._ids_elsewhere.unsqueeze(-1), 0)
        del mod._ids_elsewhere
        return all_reduce(outputs, device_mesh)

    def prepare_module_tp(self, module: nn.Module, device_mesh: DeviceMesh) -> Any:
        weight: Any = module.weight
        module.padding_idx = None  # it is for training alone, and torch wants it among this rank's rows
        if weight.shape[0] == 0:  # more ranks than parts: this one looks up a row all the same, and counts it as zero
            module.__dict__["weight"] = weight.new_zeros(1, weight.shape[1])
        return super().prepare_module_tp(module, device_mesh)


class EmbeddingColwiseParallel(ColwiseParallel):
    """Hidden-parallel: weight `Shard(1)`; each rank looks up its slice of every vector, and the slices are gathered.

    With `output_layouts=Shard(-1)` the slices stay apart: for a table of numbers per head, such as T5's position bias.
    """

    output_layouts = (Replicate(),)
    features = "embedding_dim"

    def placement(self, param_type: str, shape: Sequence[int]) -> Placement:
        return plan.Shard(1) if len(shape) > 1 else plan.Replicate()

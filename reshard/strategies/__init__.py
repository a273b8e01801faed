"""One class for each tensor-parallel style, offline and run-time halves side by side, and their registry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch.distributed.tensor import Replicate

from ..errors import BadInputError, printable
from .base import TensorParallelLayer, as_dtensor, get_packed_weights, get_tensor_shard, take, torch_placement
from .embedding import EmbeddingColwiseParallel, EmbeddingRowwiseParallel
from .linear import ColwiseParallel, PackedColwiseParallel, PackedRowwiseParallel, RowwiseParallel
from .reduction import AllReduceParallel, MoeExpertsParallel, MoeIdentityParallel

__all__ = [
    "ALL_PARALLEL_STYLES",
    "AllReduceParallel",
    "ColwiseParallel",
    "EmbeddingColwiseParallel",
    "EmbeddingRowwiseParallel",
    "MoeExpertsParallel",
    "MoeIdentityParallel",
    "PackedColwiseParallel",
    "PackedRowwiseParallel",
    "ParallelInterface",
    "RowwiseParallel",
    "TensorParallelLayer",
    "as_dtensor",
    "get_packed_weights",
    "get_tensor_shard",
    "take",
    "torch_placement",
]


_unchanged = TensorParallelLayer()
_gathered_colwise = ColwiseParallel(output_layouts=Replicate())
_split_rowwise = RowwiseParallel(input_layouts=Replicate())

_BUILT_IN: dict[str, TensorParallelLayer] = {
    "colwise": ColwiseParallel(),
    "colwise_gather_output": _gathered_colwise,
    "colwise_rep": _gathered_colwise,
    "rowwise": RowwiseParallel(),
    "rowwise_split_input": _split_rowwise,
    "rowwise_rep": _split_rowwise,
    "packed_colwise": PackedColwiseParallel(),
    "packed_rowwise": PackedRowwiseParallel(),
    "embedding_rowwise": EmbeddingRowwiseParallel(),
    "embedding_colwise": EmbeddingColwiseParallel(),
    "moe_tp_experts": MoeExpertsParallel(),
    "moe_identity_expert": MoeIdentityParallel(),
    "all_reduce": AllReduceParallel(),
    "replicate": _unchanged,
    # For training: sums the gradient of a norm that sees only this rank's heads. The forward is the module's own.
    "replicated_with_grad_allreduce": _unchanged,
    # Likewise: the rope part of MLA's compressed keys goes to every rank's heads, which concerns gradients alone.
    "mla_kv_a_proj": _unchanged,
    # Parameters beside a hook-less forward (attention sinks): their own rules cut them, the module runs as it is.
    "local_params": _unchanged,
}


class ParallelInterface(Mapping[str, TensorParallelLayer]):
    """Style name → strategy. Every instance sees the built-in styles and those registered on it."""

    def __init__(self) -> None:
        self._strategies = dict(_BUILT_IN)

    def register_strategy(self, name: str, strategy: TensorParallelLayer) -> None:
        """Make `name` usable in a plan. Replaces a strategy of that name."""
        self._strategies[name] = strategy

    def find(self, name: str) -> TensorParallelLayer:
        """The strategy of a style. Raises BadInputError, with the known styles, where there is none."""
        if name not in self:
            raise BadInputError(
                f"unknown tensor-parallel style {printable(name)!r}", hint=f"known styles: {', '.join(sorted(self))}"
            )
        return self[name]

    def __getitem__(self, name: str) -> TensorParallelLayer:
        return self._strategies[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._strategies)

    def __len__(self) -> int:
        return len(self._strategies)


ALL_PARALLEL_STYLES = ParallelInterface()

"""The strategy of each built-in style."""

from __future__ import annotations

from torch.distributed.tensor import Replicate, Shard

from .base import LocalLayer, TensorParallelLayer
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
from .sequence import SequenceParallel

__all__ = ["BUILT_IN"]


_unchanged = LocalLayer()


_gathered_colwise = ColwiseParallel(output_layouts=Replicate())


_split_rowwise = RowwiseParallel(input_layouts=Replicate())


BUILT_IN: dict[str, TensorParallelLayer] = {
    "colwise": ColwiseParallel(),
    "colwise_gather_output": _gathered_colwise,
    "colwise_rep": _gathered_colwise,
    "rowwise": RowwiseParallel(),
    "rowwise_split_input": _split_rowwise,
    "rowwise_rep": _split_rowwise,
    "packed_colwise": PackedColwiseParallel(),
    "packed_rowwise": PackedRowwiseParallel(),
    # The older guide's names for parameters that everybody sees as local tensors, not as DTensors.
    "local_colwise": ColwiseParallel(use_dtensor=False),
    "local_rowwise": RowwiseParallel(use_dtensor=False),
    "local_packed_rowwise": PackedRowwiseParallel(use_dtensor=False),
    "local": LocalLayer(use_dtensor=False),
    "conv1d_colwise": Conv1DColwiseParallel(),
    "conv1d_colwise_gather_output": Conv1DColwiseParallel(output_layouts=Replicate()),
    "conv1d_packed_colwise": Conv1DPackedColwiseParallel(),
    "conv1d_rowwise": Conv1DRowwiseParallel(),
    "conv1d_rowwise_split_input": Conv1DRowwiseParallel(input_layouts=Replicate()),
    "conv_colwise_gather_output": ConvolutionParallel(),
    "conv_transposed_colwise_gather_output": ConvolutionParallel(transposed=True),
    "embedding_rowwise": EmbeddingRowwiseParallel(),
    "embedding_colwise": EmbeddingColwiseParallel(),
    "embedding_local_colwise": EmbeddingColwiseParallel(output_layouts=Shard(-1), use_dtensor=False),
    "heads": HeadsParallel(),
    "sequence_parallel": SequenceParallel(),
    "interleaved_rowwise": InterleavedParallel(),
    "moe_tp_experts": MoeExpertsParallel(),
    "moe_identity_expert": MoeIdentityParallel(),
    "all_reduce": AllReduceParallel(),
    "gather": AllReduceParallel(),  # the older guide's name: it sums the module's outputs
    "grouped_gemm": ExpertShardParallel(),
    "ep_dispatch_experts": ExpertsDispatchParallel(),
    # transformers 5.17 masks the routes after the router, later releases before the experts, as here.
    "ep_router": _unchanged,
    "replicate": _unchanged,
    # For training: sums the gradient of a norm that sees only this rank's heads. The forward stays the module's own.
    "replicated_with_grad_allreduce": _unchanged,
    # For training too: the rope part of MLA's compressed keys goes to every rank's heads, which changes only gradients.
    "mla_kv_a_proj": _unchanged,
    # Parameters of a module without hooks (attention sinks): their own rules cut them, the module runs as it is.
    "local_params": _unchanged,
}

"""Names of styles and the strategy of each: built-in ones, and the user's."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from pathlib import Path

from torch.distributed.tensor import Replicate, Shard

from ..errors import BadInputError
from ..files.system import by_errno
from ..text import printable
from .base import LocalLayer, TensorParallelLayer
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
from .sequence import SequenceParallel

__all__ = ["ALL_PARALLEL_STYLES", "ParallelInterface", "as_strategies", "load_strategies"]


_unchanged = LocalLayer()


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
    # The older guide's names for parameters that everybody sees as local tensors, not as DTensors.
    "local_colwise": ColwiseParallel(use_dtensor=False),
    "local_rowwise": RowwiseParallel(use_dtensor=False),
    "local_packed_rowwise": PackedRowwiseParallel(use_dtensor=False),
    "local": LocalLayer(use_dtensor=False),
    "conv1d_colwise": Conv1DColwiseParallel(),
    "conv1d_colwise_gather_output": Conv1DColwiseParallel(output_layouts=Replicate()),
    "conv1d_rowwise": Conv1DRowwiseParallel(),
    "conv1d_rowwise_split_input": Conv1DRowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": EmbeddingRowwiseParallel(),
    "embedding_colwise": EmbeddingColwiseParallel(),
    "embedding_local_colwise": EmbeddingColwiseParallel(output_layouts=Shard(-1), use_dtensor=False),
    "sequence_parallel": SequenceParallel(),
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


_WITH_BLOCKS = re.compile(r"(\w+)\[(\d+(?:,\d+)*)\]")


class ParallelInterface(Mapping[str, TensorParallelLayer]):
    """Style → strategy. Every instance has the built-in styles and those registered on it."""

    def __init__(self) -> None:
        self._strategies = dict(_BUILT_IN)

    def register_strategy(self, name: str, strategy: TensorParallelLayer) -> None:
        """Make `name` usable in a plan. Replaces a strategy of that name. Raises TypeError if `strategy` is none."""
        if not isinstance(strategy, TensorParallelLayer):
            raise TypeError(f"{name}: register an instance of a TensorParallelLayer, not {strategy!r}")
        self._strategies[name] = strategy

    def find(self, name: str) -> TensorParallelLayer:
        """Return the strategy of a style. `packed_colwise[4,1,1]` is `packed_colwise` with blocks of these relative
        sizes. Raises BadInputError, with the known styles, if there is none.
        """
        packed = _WITH_BLOCKS.fullmatch(name)
        if packed and isinstance(self.get(packed[1]), (PackedColwiseParallel, PackedRowwiseParallel)):
            strategy = copy(self[packed[1]])
            strategy.blocks = [int(size) for size in packed[2].split(",")]  # type: ignore[attr-defined]
            return strategy
        if name not in self:
            raise BadInputError(
                f"unknown tensor-parallel style {printable(name)!r}",
                hint=f"known styles: {', '.join(sorted(self))}; a style of your own comes with --strategies FILE.py",
            )
        return self[name]

    def custom(self, names: Iterable[str]) -> dict[str, str]:
        """Return the custom styles among `names`, and the class of each."""
        return {name: type(self[name]).__name__ for name in sorted(names) if self.get(name) is not _BUILT_IN.get(name)}

    def __getitem__(self, name: str) -> TensorParallelLayer:
        return self._strategies[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._strategies)

    def __len__(self) -> int:
        return len(self._strategies)


ALL_PARALLEL_STYLES = ParallelInterface()


def as_strategies(given: ParallelInterface | str | Path) -> ParallelInterface:
    """Return `given`, or, if it is a path, the strategies that `load_strategies` loads from it."""
    return given if isinstance(given, ParallelInterface) else load_strategies(given)


def load_strategies(path: str | Path) -> ParallelInterface:
    """Run a Python file of yours and return its styles together with the built-in ones.

    The file registers them on `ALL_PARALLEL_STYLES` under their names. It is code: run only files you wrote or read.

    Raises:
        BadInputError: there is no such file, it fails, or it registers nothing.
    """
    before = dict(ALL_PARALLEL_STYLES)
    try:
        runpy.run_path(str(path), run_name="strategies")
    except OSError as error:
        raise by_errno(error, f"{printable(path)}: cannot be read: {error.strerror}", BadInputError) from None
    except Exception as error:
        raise BadInputError(f"{printable(path)}: {type(error).__name__}: {printable(error)}") from error
    if dict(ALL_PARALLEL_STYLES) == before:
        raise BadInputError(
            f"{printable(path)}: registers no strategy",
            hint="end it with ALL_PARALLEL_STYLES.register_strategy(NAME, STRATEGY)",
        )
    return ALL_PARALLEL_STYLES

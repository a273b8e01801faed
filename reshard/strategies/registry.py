"""Names of styles and the strategy of each: built-in ones, and the user's.

Importing it does not import torch: the built-in strategies are made when one is first asked for.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BadInputError
from ..files.system import by_errno
from ..text import printable

if TYPE_CHECKING:
    from .base import TensorParallelLayer

__all__ = [
    "ALL_PARALLEL_STYLES",
    "KEY_VALUE",
    "ParallelInterface",
    "as_strategies",
    "heads_in",
    "is_built_in",
    "load_strategies",
]

# The names of `BUILT_IN`, which are known before torch is imported.
_NAMES = frozenset(
    (
        *("colwise", "colwise_gather_output", "colwise_rep", "rowwise", "rowwise_split_input", "rowwise_rep"),
        *("packed_colwise", "packed_rowwise", "local_colwise", "local_rowwise", "local_packed_rowwise", "local"),
        *("conv1d_colwise", "conv1d_colwise_gather_output", "conv1d_rowwise", "conv1d_rowwise_split_input"),
        *("conv1d_packed_colwise", "heads", "interleaved_rowwise"),
        *("conv_colwise_gather_output", "conv_transposed_colwise_gather_output"),
        *("embedding_rowwise", "embedding_colwise", "embedding_local_colwise", "sequence_parallel"),
        *("moe_tp_experts", "moe_identity_expert", "all_reduce", "gather", "grouped_gemm", "ep_dispatch_experts"),
        *("ep_router", "replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj", "local_params"),
    )
)
_PACKED = ("packed_colwise", "packed_rowwise", "local_packed_rowwise", "conv1d_packed_colwise")
KEY_VALUE = ("k", "v", "key", "value", "k_proj", "v_proj")  # projections of KV heads, by name
_WITH_BLOCKS = re.compile(r"(\w+)\[(\d+(?:,\d+)*)\]")
_HEADS = re.compile(r"heads\[(\d+),(\d+)((?:,(?:kv:)?[A-Za-z_][\w.]*)*)\]")


@cache
def _built_in() -> dict[str, TensorParallelLayer]:
    from .built_in import BUILT_IN

    return BUILT_IN


class ParallelInterface(Mapping[str, "TensorParallelLayer"]):
    """Style → strategy. Every instance has the built-in styles and those registered on it."""

    def __init__(self) -> None:
        self._registered: dict[str, TensorParallelLayer] = {}

    @property
    def is_plain(self) -> bool:
        """Whether every style is a built-in one: nothing was registered."""
        return not self._registered

    def register_strategy(self, name: str, strategy: TensorParallelLayer) -> None:
        """Make `name` usable in a plan. Replaces a strategy of that name. Raises TypeError if `strategy` is none."""
        from .base import TensorParallelLayer

        if not isinstance(strategy, TensorParallelLayer):
            raise TypeError(f"{name}: register an instance of a TensorParallelLayer, not {strategy!r}")
        self._registered[name] = strategy

    def find(self, name: str) -> TensorParallelLayer:
        """Return the strategy of a style. `packed_colwise[4,1,1]` is `packed_colwise` with blocks of these relative
        sizes; `heads[32,8,num_heads]` says that a module has 32 query heads and 8 KV heads, and counts them in
        `num_heads`. Raises BadInputError, with the known styles, if there is none.
        """
        from .linear import PackedColwiseParallel, PackedRowwiseParallel

        counted = heads_in(name)
        if counted:
            from .heads import HeadsParallel

            return HeadsParallel(*counted)
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
        return {
            name: type(self[name]).__name__ for name in sorted(names) if self.get(name) is not _built_in().get(name)
        }

    def __getitem__(self, name: str) -> TensorParallelLayer:
        return self._registered[name] if name in self._registered else _built_in()[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**_built_in(), **self._registered})

    def __len__(self) -> int:
        return len({*_built_in(), *self._registered})


ALL_PARALLEL_STYLES = ParallelInterface()


def heads_in(style: str) -> tuple[int, int, tuple[str, ...]] | None:
    """Return the query heads, the KV heads and the attributes that a style `heads[…]` names; None if it is another."""
    found = _HEADS.fullmatch(style)
    return found and (int(found[1]), int(found[2]), tuple(filter(None, found[3].split(","))))


def is_built_in(style: str) -> bool:
    """Whether a style is a built-in one, perhaps with its blocks. It does not import torch."""
    packed = _WITH_BLOCKS.fullmatch(style)
    return style in _NAMES or heads_in(style) is not None or (packed is not None and packed[1] in _PACKED)


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

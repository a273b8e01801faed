"""A tensor that knows only where its elements come from.

transformers describes checkpoint conversions (fuse the experts, split a fused projection, permute for rope) as
operations on tensors, and a tensor-parallel strategy cuts tensors. Run on `RegionTensor`s, the same code yields regions
instead of data: whatever moves elements is understood here without a second copy of its rules. An operation that
computes raises `NotACopyError`.

torch breaks every operation on tensors into a few of its own (`torch.ops.aten`). Those that only move elements are
below.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch

from ..files.dtypes import FLOATING, widest
from ..sharding.placement import Piece
from ..sharding.regions import Region, cut, whole
from ..sharding.reshape import reshape

__all__ = ["NotACopyError", "RegionTensor", "casts_left_to_the_copy"]

_aten = torch.ops.aten
_casts_are_left: ContextVar[bool] = ContextVar("_casts_are_left", default=False)


class NotACopyError(Exception):
    """The operation computes new values, so no region describes its result."""


@contextlib.contextmanager
def casts_left_to_the_copy() -> Iterator[None]:
    """Ignore casts between floating dtypes inside the context: elements are cast once, as they are copied. This is
    right if the plan decides the dtype afterwards, as for transformers' conversions."""
    before = _casts_are_left.set(True)
    try:
        yield
    finally:
        _casts_are_left.reset(before)


class RegionTensor(torch.Tensor):
    """Stands in for a tensor of `shape` and `dtype`, always contiguous, whose elements are given by `regions`."""

    regions: tuple[Region, ...]

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, regions: Sequence[Region]) -> RegionTensor:
        tensor = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device="cpu")
        tensor.regions = tuple(regions)
        return tensor

    @classmethod
    def of_source(cls, name: str, shape: Sequence[int], dtype: torch.dtype) -> RegionTensor:
        return cls(shape, dtype, whole(name, shape))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        handler = _MOVES.get(func.overloadpacket)
        if handler is None:
            raise NotACopyError(func.overloadpacket.__name__)
        return handler(*args, **(kwargs or {}))

    def __repr__(self, **_: Any) -> str:
        return f"RegionTensor({tuple(self.shape)}, {self.dtype}, {len(self.regions)} regions)"


def _with(tensor: RegionTensor, shape: Sequence[int], regions: Sequence[Region]) -> RegionTensor:
    return RegionTensor(shape, tensor.dtype, regions)


def _same(tensor: RegionTensor, *_: Any, **__: Any) -> RegionTensor:
    return _with(tensor, tensor.shape, tensor.regions)


def _to(tensor: RegionTensor, *, dtype: torch.dtype | None = None, **_: Any) -> RegionTensor:
    if dtype in (None, tensor.dtype):
        return _same(tensor)
    names = {str(kind).removeprefix("torch.") for kind in (tensor.dtype, dtype)}
    if not (_casts_are_left.get() and names <= FLOATING):
        raise NotACopyError(f"cast from {tensor.dtype} to {dtype}")
    return RegionTensor(tensor.shape, dtype, tensor.regions)


def _narrow(tensor: RegionTensor, dim: int, start: int, length: int) -> RegionTensor:
    dim %= tensor.ndim
    zeros = (0,) * tensor.ndim
    extent = (*tensor.shape[:dim], length, *tensor.shape[dim + 1 :])
    return _with(tensor, extent, cut(tensor.regions, Piece((*zeros[:dim], start, *zeros[dim + 1 :]), extent, zeros)))


def _slice(
    tensor: RegionTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> RegionTensor:
    if step != 1:
        chosen = range(*slice(start, end, step).indices(tensor.shape[dim]))
        return _cat([_narrow(tensor, dim, at, 1) for at in chosen], dim) if chosen else _narrow(tensor, dim, 0, 0)
    first, last, _ = slice(start, end).indices(tensor.shape[dim])
    return _narrow(tensor, dim, first, max(0, last - first))


def _select(tensor: RegionTensor, dim: int, index: int) -> RegionTensor:
    return _squeeze(_narrow(tensor, dim, index % tensor.shape[dim], 1), dim)


def _permute(tensor: RegionTensor, dims: Sequence[int]) -> RegionTensor:
    order = [d % tensor.ndim for d in dims]

    def reorder(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(values[d] for d in order)

    regions = [
        Region(r.source, r.offset, reorder(r.strides), reorder(r.extent), reorder(r.target_start))
        for r in tensor.regions
    ]
    return _with(tensor, reorder(tensor.shape), regions)


def _transpose(tensor: RegionTensor, dim0: int, dim1: int) -> RegionTensor:
    order = list(range(tensor.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(tensor, order)


def _t(tensor: RegionTensor) -> RegionTensor:
    return _permute(tensor, list(reversed(range(tensor.ndim))))


def _unsqueeze(tensor: RegionTensor, dim: int) -> RegionTensor:
    dim %= tensor.ndim + 1

    def widen(values: Sequence[int], new: int) -> tuple[int, ...]:
        return (*values[:dim], new, *values[dim:])

    regions = [
        Region(r.source, r.offset, widen(r.strides, 0), widen(r.extent, 1), widen(r.target_start, 0))
        for r in tensor.regions
    ]
    return _with(tensor, widen(tensor.shape, 1), regions)


def _squeeze(tensor: RegionTensor, dims: int | Sequence[int] | None = None) -> RegionTensor:
    chosen = range(tensor.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    dropped = {d % tensor.ndim for d in chosen if tensor.shape[d] == 1}

    def narrow(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(value for d, value in enumerate(values) if d not in dropped)

    regions = [
        Region(r.source, r.offset, narrow(r.strides), narrow(r.extent), narrow(r.target_start)) for r in tensor.regions
    ]
    return _with(tensor, narrow(tensor.shape), regions)


def _split(tensor: RegionTensor, sizes: int | Sequence[int], dim: int = 0) -> list[RegionTensor]:
    if isinstance(sizes, int):
        sizes = [min(sizes, tensor.shape[dim] - start) for start in range(0, tensor.shape[dim], sizes)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_narrow(tensor, dim, start, size) for start, size in zip(starts, sizes)]


def _unbind(tensor: RegionTensor, dim: int = 0) -> list[RegionTensor]:
    return [_select(tensor, dim, i) for i in range(tensor.shape[dim])]


def _view(tensor: RegionTensor, shape: Sequence[int], *_: Any) -> RegionTensor:
    if isinstance(shape, torch.dtype):
        raise NotACopyError(f"view as {shape}")
    wanted = list(shape)
    if -1 in wanted:
        wanted[wanted.index(-1)] = tensor.numel() // max(1, -math.prod(wanted))
    return _with(tensor, wanted, reshape(tensor.regions, tuple(tensor.shape), tuple(wanted)))


def _stack(tensors: Sequence[RegionTensor], dim: int = 0) -> RegionTensor:
    return _cat([_unsqueeze(tensor, dim) for tensor in tensors], dim)


def _cat(tensors: Sequence[RegionTensor], dim: int = 0) -> RegionTensor:
    first = tensors[0]
    dim %= first.ndim
    regions, at = [], 0
    for tensor in tensors:
        if not isinstance(tensor, RegionTensor):
            raise NotACopyError("concatenation with new values")
        if (*tensor.shape[:dim], *tensor.shape[dim + 1 :]) != (*first.shape[:dim], *first.shape[dim + 1 :]):
            raise ValueError(f"cannot concatenate {tuple(first.shape)} and {tuple(tensor.shape)} along dim {dim}")
        for r in tensor.regions:
            start = (*r.target_start[:dim], r.target_start[dim] + at, *r.target_start[dim + 1 :])
            regions.append(Region(r.source, r.offset, r.strides, r.extent, start))
        at += tensor.shape[dim]
    names = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
    dtype = widest(names)  # elements are cast to it as they are copied
    if dtype is None:
        raise NotACopyError(f"concatenation of {' and '.join(sorted(names))}")
    return RegionTensor((*first.shape[:dim], at, *first.shape[dim + 1 :]), getattr(torch, dtype), regions)


_MOVES: dict[Any, Callable] = {
    **dict.fromkeys((_aten.alias, _aten.clone, _aten.detach, _aten.lift_fresh), _same),
    **dict.fromkeys((_aten.view, _aten._unsafe_view, _aten._reshape_alias, _aten.reshape), _view),
    **dict.fromkeys((_aten.split, _aten.split_with_sizes), _split),
    _aten._to_copy: _to,
    _aten.cat: _cat,
    _aten.narrow: _narrow,
    _aten.permute: _permute,
    _aten.select: _select,
    _aten.slice: _slice,
    _aten.squeeze: _squeeze,
    _aten.stack: _stack,
    _aten.t: _t,
    _aten.transpose: _transpose,
    _aten.unbind: _unbind,
    _aten.unsqueeze: _unsqueeze,
}

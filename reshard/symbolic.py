"""A tensor that knows only where its elements come from.

Transformers describes checkpoint conversions (fuse the experts, split a fused projection, permute for rope) as
operations on tensors. Run on `RegionTensor`s, the same operations yield regions instead of data, so whatever upstream
does by moving elements is understood here without a second copy of its rules. An operation that computes raises
`NotACopyError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .placement import Piece
from .regions import Region, cut, whole
from .reshape import reshape

__all__ = ["NotACopyError", "RegionTensor"]


class NotACopyError(Exception):
    """The operation computes new values, so no region describes its result."""


class RegionTensor:
    """Stands in for a tensor of `shape` and `dtype` whose elements are given by `regions`."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, regions: Sequence[Region]) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.regions = tuple(regions)
        self.device = torch.device("cpu")

    @classmethod
    def of_source(cls, name: str, shape: Sequence[int], dtype: torch.dtype) -> RegionTensor:
        return cls(shape, dtype, whole(name, shape))

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _FUNCTIONS.get(func)
        if handler is None:
            raise NotACopyError(getattr(func, "__name__", str(func)))
        return handler(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotACopyError(name)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    def _same(self, *args: Any, **kwargs: Any) -> RegionTensor:
        return self

    contiguous = clone = detach = _same

    def narrow(self, dim: int, start: int, length: int) -> RegionTensor:
        dim %= self.ndim
        zeros = (0,) * self.ndim
        extent = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        piece = Piece((*zeros[:dim], start, *zeros[dim + 1 :]), extent, zeros)
        return RegionTensor(extent, self.dtype, cut(self.regions, piece))

    def __getitem__(self, index: Any) -> RegionTensor:
        result, dim = self, 0
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in index:
            at = index.index(Ellipsis)
            index = (*index[:at], *[slice(None)] * (self.ndim - len(index) + 1), *index[at + 1 :])
        for item in index:
            if isinstance(item, int):
                result = result.narrow(dim, item % result.shape[dim], 1).squeeze(dim)
            elif isinstance(item, slice) and item.step in (None, 1):
                start, stop, _ = item.indices(result.shape[dim])
                result, dim = result.narrow(dim, start, max(0, stop - start)), dim + 1
            else:
                raise NotACopyError("indexing")
        return result

    def permute(self, *dims: Any) -> RegionTensor:
        order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
        order = [d % self.ndim for d in order]
        regions = [
            Region(
                r.source, r.offset, *(tuple(field[d] for d in order) for field in (r.strides, r.extent, r.target_start))
            )
            for r in self.regions
        ]
        return RegionTensor([self.shape[d] for d in order], self.dtype, regions)

    def transpose(self, dim0: int, dim1: int) -> RegionTensor:
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return self.permute(order)

    def t(self) -> RegionTensor:
        return self.permute(list(reversed(range(self.ndim))))

    @property
    def T(self) -> RegionTensor:
        return self.t()

    def unsqueeze(self, dim: int) -> RegionTensor:
        dim %= self.ndim + 1

        def widen(values: tuple[int, ...], new: int) -> tuple[int, ...]:
            return (*values[:dim], new, *values[dim:])

        regions = [
            Region(r.source, r.offset, widen(r.strides, 0), widen(r.extent, 1), widen(r.target_start, 0))
            for r in self.regions
        ]
        return RegionTensor(widen(tuple(self.shape), 1), self.dtype, regions)

    def squeeze(self, dim: int) -> RegionTensor:
        dim %= self.ndim
        if self.shape[dim] != 1:
            return self
        shape = (*self.shape[:dim], *self.shape[dim + 1 :])
        return RegionTensor(shape, self.dtype, [_drop(r, dim) for r in self.regions])

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> tuple[RegionTensor, ...]:
        total = self.shape[dim]
        if isinstance(sizes, int):
            sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return tuple(self.narrow(dim, start, size) for start, size in zip(starts, sizes))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[RegionTensor, ...]:
        return self.split(max(1, -(-self.shape[dim] // chunks)), dim)

    def unbind(self, dim: int = 0) -> tuple[RegionTensor, ...]:
        return tuple(self.narrow(dim, i, 1).squeeze(dim) for i in range(self.shape[dim]))

    def reshape(self, *shape: Any) -> RegionTensor:
        wanted = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if -1 in wanted:
            wanted[wanted.index(-1)] = self.numel() // max(1, -math.prod(wanted))
        if math.prod(wanted) != self.numel():
            raise ValueError(f"cannot reshape {tuple(self.shape)} to {tuple(wanted)}")
        return RegionTensor(wanted, self.dtype, reshape(self.regions, tuple(self.shape), tuple(wanted)))

    view = reshape

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> RegionTensor:
        end = end_dim % self.ndim
        return self.reshape([*self.shape[:start_dim], -1, *self.shape[end + 1 :]])


def _drop(region: Region, dim: int) -> Region:
    """The region without a dim of extent one."""
    keep = [d for d in range(len(region.extent)) if d != dim]
    return Region(
        region.source,
        region.offset,
        *(tuple(field[d] for d in keep) for field in (region.strides, region.extent, region.target_start)),
    )


def _stack(tensors: Sequence[RegionTensor], dim: int = 0) -> RegionTensor:
    return _cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


def _cat(tensors: Sequence[RegionTensor], dim: int = 0) -> RegionTensor:
    first = tensors[0]
    dim %= first.ndim
    regions, at = [], 0
    for tensor in tensors:
        if tensor.dtype != first.dtype:
            raise NotACopyError("concatenation of different dtypes")
        if (*tensor.shape[:dim], *tensor.shape[dim + 1 :]) != (*first.shape[:dim], *first.shape[dim + 1 :]):
            raise ValueError(f"cannot concatenate {tuple(first.shape)} and {tuple(tensor.shape)} along dim {dim}")
        for r in tensor.regions:
            start = (*r.target_start[:dim], r.target_start[dim] + at, *r.target_start[dim + 1 :])
            regions.append(Region(r.source, r.offset, r.strides, r.extent, start))
        at += tensor.shape[dim]
    return RegionTensor((*first.shape[:dim], at, *first.shape[dim + 1 :]), first.dtype, regions)


_FUNCTIONS: dict[Callable, Callable] = {
    torch.stack: _stack,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.chunk: RegionTensor.chunk,
    torch.split: RegionTensor.split,
    torch.transpose: RegionTensor.transpose,
    torch.permute: RegionTensor.permute,
    torch.reshape: RegionTensor.reshape,
    torch.flatten: RegionTensor.flatten,
    torch.squeeze: RegionTensor.squeeze,
    torch.unsqueeze: RegionTensor.unsqueeze,
    torch.unbind: RegionTensor.unbind,
    torch.narrow: RegionTensor.narrow,
}

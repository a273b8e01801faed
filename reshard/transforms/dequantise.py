"""The values of a quantized parameter, from the part of its bundle that a rank holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import IntegrityError
from ..sharding.placement import Piece, Placement, local_shape, pieces
from ..text import printable
from .bundle import Follows, Member, Quantized, Role, block_at, boxes_of, member_box, member_placement, member_shape

__all__ = ["Format", "Held", "Metadata", "Options", "Part", "dequantised", "values_of"]

_AT_ONCE = 1 << 18  # elements dequantised at a time where memory matters
_MOST = 1 << 22  # elements dequantised at a time: what is in between takes a few times their bytes

Options = Mapping[str, Any]
Metadata = Callable[[], Mapping[str, str]]
Held = Callable[[str, tuple[int, ...], tuple[int, ...]], torch.Tensor]
"""Read a box of a tensor of a bundle, by its name, start and extent."""


@dataclass(frozen=True, slots=True)
class Part:
    """The entries of one tensor of a bundle that meet a box of the parameter.

    `tensor` has the member's own dims, of which `dims` says what they follow in the matrix, [out, in]. `start` and
    `extent` are those of the box in its matrix, [out, in]; `size` is the shape of the matrix.
    """

    tensor: torch.Tensor
    dims: tuple[Follows, ...]
    start: tuple[int, int]
    extent: tuple[int, int]
    size: tuple[int, int]

    def each(self) -> torch.Tensor:
        """Return the entry of each element, [out, in] of the box; of one size along a dim that the tensor does not
        follow."""
        found = self.tensor
        for number, at in enumerate(self.dims):
            if at.unit > 1:
                places = self._elements(at.dim) // at.unit
                found = _selected(found, number, places - self.start[at.dim] // at.unit)
        return self._in_order(found)

    def unpacked(self, bits: int, dim: int, order: Sequence[int] | None = None) -> torch.Tensor:
        """Return each element's number of `bits` bits, [out, in] of the box, from words that follow `dim`.

        The lowest bits of a word belong to its first element, and an element may be in two words. `order` gives the
        places in a word of its elements, if they are not in order. The numbers are int32, from 0.

        Raises ValueError for other numbers of bits than 1 to 8, which a manifest may claim.
        """
        if bits not in range(1, 9):
            raise ValueError(f"numbers of {bits!r:.20} bits")
        number = next(number for number, at in enumerate(self.dims) if at.dim == dim)
        at, size = self.dims[number], 8 * self.tensor.element_size()
        elements = self._elements(dim)
        if order is not None:
            elements = elements // at.unit * at.unit + torch.tensor(order, device=elements.device)[elements % at.unit]
        low, shift = elements * bits // size - self.start[dim] // at.unit * at.width, elements * bits % size
        high = (low + 1).clamp(max=self.tensor.shape[number] - 1)
        words = self.tensor.view(_UNSIGNED[size]).to(torch.int64)
        shift = shift.reshape([-1 if one == number else 1 for one in range(words.ndim)])
        found = words.index_select(number, low) >> shift
        if size % bits:
            found |= words.index_select(number, high) << (size - shift)
        found = (found & (1 << bits) - 1).to(torch.int32)
        for other, along in enumerate(self.dims):
            if other != number and along.unit > 1:
                places = self._elements(along.dim) // along.unit
                found = found.index_select(other, places - self.start[along.dim] // along.unit)
        return self._in_order(found)

    def _elements(self, dim: int) -> torch.Tensor:
        return torch.arange(self.start[dim], self.start[dim] + self.extent[dim], device=self.tensor.device)

    def _in_order(self, found: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the member's dims as [out, in]."""
        shape = [1, 1]
        for number, at in enumerate(self.dims):
            shape[at.dim] = found.shape[number]
        dims = [at.dim for at in self.dims]
        return found.permute(sorted(range(found.ndim), key=lambda number: dims[number])).reshape(shape)


_UNSIGNED = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}


def _selected(tensor: torch.Tensor, dim: int, places: torch.Tensor) -> torch.Tensor:
    if tensor.element_size() == 1:  # torch has no selection among numbers of 8 bits
        return tensor.view(torch.uint8).index_select(dim, places).view(tensor.dtype)
    return tensor.index_select(dim, places)


@dataclass(frozen=True, slots=True)
class Format:
    """A format of quantization.

    `name` is the manifest's word for it. A parameter's name ends with `parameter` (perhaps nothing) where the names of
    its tensors end with the suffixes of their roles. `options` gives the options of every scheme that a checkpoint's
    `quantization_config` allows; it can ask for the metadata of the checkpoint's files. `roles` are the tensors of a
    matrix of a shape [out, in]; the first one is the mark of a quantized module. `values` dequantises: it is given each
    role's part of one box, and returns the box's elements [out, in]. `runs` says whether any transformers runs it.
    """

    name: str
    parameter: str
    options: Callable[[Mapping[str, Any], Metadata], Sequence[Options]]
    roles: Callable[[Options, tuple[int, int] | None], Sequence[Role]]
    values: Callable[[Options, Mapping[str, Part]], torch.Tensor]
    runs: bool = True


def dequantised(
    form: Format,
    bundle: Quantized,
    placement: Placement,
    tensors: Mapping[str, torch.Tensor],
    *,
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype,
    name: str = "",
) -> torch.Tensor:
    """Return the rank's part of a parameter, in `dtype`, from the parts of its bundle's tensors that the rank holds.

    Raises IntegrityError, which says `name`, if what the tensors hold makes no sense.
    """
    shape = tuple(map(sum, bundle.blocks))
    device = next(iter(tensors.values())).device
    made = torch.empty(local_shape(placement, shape, rank=rank, world_size=world_size), dtype=dtype, device=device)
    held = {}
    for one, member in bundle.members.items():
        there = member_placement(member, bundle.blocks, placement, shape, world_size)
        held[one] = pieces(there, member_shape(member, bundle.blocks), rank=rank, world_size=world_size)
    for box in boxes_of(placement, bundle, rank=rank, world_size=world_size, most=_MOST):
        parts = {
            member.role: _part(tensors[one], member, held[one], box, bundle.blocks)
            for one, member in bundle.members.items()
        }
        values = _values(form, bundle.options, parts, name)
        filled = tuple(slice(at, at + size) for at, size in zip(box.local_start, box.extent))
        made[filled] = values.to(dtype).reshape(box.extent)
    return made


def values_of(
    form: Format,
    bundle: Quantized,
    place: tuple[int, ...],
    rows: tuple[int, int],
    columns: tuple[int, int],
    held: Held,
    *,
    name: str = "",
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the values of a box of a matrix of a parameter, [rows, columns], some rows at a time: the first row, and
    the values. `place` is the matrix's, in the dims before the last two.

    Raises IntegrityError, which says `name`, if what the tensors hold makes no sense.
    """
    outer, size = len(place), tuple(sum(along) for along in bundle.blocks[-2:])
    step = max(1, _AT_ONCE // max(1, columns[1] - columns[0]))
    for first in range(*rows, step):
        extent = (min(step, rows[1] - first), columns[1] - columns[0])
        box = Piece((*place, first, columns[0]), ((1,) * outer + extent), ())
        parts = {}
        for one, member in bundle.members.items():
            wanted = member_box(member, box, bundle.blocks)
            tensor = held(one, tuple(low for low, _ in wanted), tuple(high - low for low, high in wanted))
            own = [at for at in member.dims if at.dim >= outer]
            inner = tuple(Follows(at.dim - outer, at.unit, at.width) for at in own)
            tensor = tensor.reshape([length for length, at in zip(tensor.shape, member.dims) if at.dim >= outer])
            parts[member.role] = Part(tensor, inner, (first, columns[0]), extent, size)  # type: ignore[arg-type]
        yield first, _values(form, bundle.options, parts, name)


def _values(form: Format, options: Options, parts: Mapping[str, Part], name: str) -> torch.Tensor:
    try:
        return form.values(options, parts)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise IntegrityError(f"{printable(name)}: cannot be dequantised: {printable(error)}") from None


def _part(
    tensor: torch.Tensor, member: Member, held: Sequence[Piece], box: Piece, blocks: Sequence[Sequence[int]]
) -> Part:
    """Find a member's entries for a box in the rank's tensor."""
    outer = len(blocks) - 2
    start, size = [], []
    for at, along in zip(box.start[outer:], blocks[outer:]):
        number, first = block_at(at, along)
        start.append(at - first)
        size.append(along[number])
    where = (tuple(start), box.extent[outer:], tuple(size))
    wanted = member_box(member, box, blocks)
    if member.lengths:
        return Part(tensor[slice(*wanted[0])], (), *where)  # type: ignore[arg-type]
    for piece in held:
        if all(at <= low and high <= at + size for (low, high), at, size in zip(wanted, piece.start, piece.extent)):
            slices = tuple(
                slice(low - at + local, high - at + local)
                for (low, high), at, local in zip(wanted, piece.start, piece.local_start)
            )
            found = tensor[slices]
            own = tuple(at for at in member.dims if at.dim >= outer)
            for number in reversed([number for number, at in enumerate(member.dims) if at.dim < outer]):
                found = found.select(number, 0)
            inner = tuple(Follows(at.dim - outer, at.unit, at.width) for at in own)
            return Part(found, inner, *where)  # type: ignore[arg-type]
    raise ValueError(f"no part of the rank's tensor holds {wanted}")

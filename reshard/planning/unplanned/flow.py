"""How cut features flow through a forward: which dim of each tensor holds them, and where a whole vector is needed.

Every linear layer is taken as if each rank had a part of its output features. Operations carry that mark along a dim:
elementwise ones, views of features as heads, products of each head's matrices. Anything else needs the whole vector,
and what flowed there cannot be cut. Sizes are those of one process; nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .marks import Mark, merged_view, met, part_of

__all__ = ["carried", "flat"]

aten = torch.ops.aten

Find = Callable[[torch.Tensor], "Mark | None"]
Uniform = Callable[[torch.Tensor, int], bool]


def carried(func: Any, args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Uniform) -> Any:
    """Return the marks of what an operation made: one, or a list for a list of tensors. None if it carries none.

    `mark_of` gives the mark of a tensor, `uniform` says whether a tensor does not vary along a dim. If an operation
    needs the whole vector, the streams of its arguments end.
    """
    tensors = [one for one in flat((args, kwargs)) if isinstance(one, torch.Tensor)]
    marks = [mark for mark in map(mark_of, tensors) if mark is not None]
    if not marks:
        return None
    packet = func.overloadpacket
    if func.namespace == "prim":  # it asks about a tensor
        return None
    if func._schema.is_mutable and mark_of(args[0]) is None:
        for mark in marks:  # what else sees the tensor that is written to is not known
            mark.stream.end(f"{packet} writes them into another tensor")
        return None
    rule = _RULES.get(packet)
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = _pointwise
    found = rule(args, kwargs, out, mark_of, uniform) if rule else None
    if found is None:
        for mark in marks:
            mark.stream.end(f"{packet} needs all of them")
    return found


def flat(value: Any) -> Iterator[Any]:
    """Yield what lists, tuples and dicts hold."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from flat(part)
    elif isinstance(value, dict):
        yield from flat(list(value.values()))
    else:
        yield value


def _pointwise(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Uniform) -> Mark | None:
    """Elementwise, with broadcasting: all that have features have them on one dim of the result."""
    if not isinstance(out, torch.Tensor):
        return None
    tensors = [one for one in flat((args, kwargs)) if isinstance(one, torch.Tensor)]
    marked = [(tensor, mark) for tensor in tensors if (mark := mark_of(tensor))]
    dims = {out.ndim - tensor.ndim + mark.dim for tensor, mark in marked}
    if len(dims) != 1:
        return None
    dim = dims.pop()
    size = out.shape[dim]
    for tensor in tensors:
        own = dim - (out.ndim - tensor.ndim)
        if mark_of(tensor) is None and own >= 0 and not uniform(tensor, own):
            return None
    if any(tensor.shape[mark.dim] != size for tensor, mark in marked):
        return None
    return met([mark for _, mark in marked], dim)


def _same(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Any) -> Any:
    mark = mark_of(args[0])
    if mark is None or any(mark_of(one) for one in flat((args[1:], kwargs)) if isinstance(one, torch.Tensor)):
        return None
    return [mark] * len(out) if isinstance(out, (list, tuple)) else mark


def _transpose(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Any) -> Mark | None:
    mark, ndim = mark_of(args[0]), args[0].ndim
    one, other = (args[1] % ndim, args[2] % ndim) if len(args) > 2 else (0, ndim - 1)
    return mark and mark.at({one: other, other: one}.get(mark.dim, mark.dim))


def _permute(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Any) -> Mark | None:
    mark = mark_of(args[0])
    return mark and mark.at([dim % args[0].ndim for dim in args[1]].index(mark.dim))


def _unsqueeze(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Any) -> Mark | None:
    mark, at = mark_of(args[0]), args[1] % out.ndim
    return mark and mark.at(mark.dim + (at <= mark.dim))


def _squeeze(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Any) -> Mark | None:
    mark, shape = mark_of(args[0]), args[0].shape
    given = args[1] if len(args) > 1 else list(range(len(shape)))
    dims = [dim % len(shape) for dim in (given if isinstance(given, (list, tuple)) else [given])]
    gone = [dim for dim in dims if shape[dim] == 1]
    if mark is None or mark.dim in gone:
        return None
    return mark.at(mark.dim - sum(dim < mark.dim for dim in gone))


def _expand(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Any) -> Mark | None:
    mark = mark_of(args[0])
    return mark and mark.at(mark.dim + out.ndim - args[0].ndim)


def _view(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Any) -> Mark | None:
    mark = mark_of(args[0])
    if mark is None:
        return None
    for before, after in _groups(tuple(args[0].shape), tuple(out.shape)):
        if mark.dim in before:
            return merged_view(mark, [(dim, args[0].shape[dim]) for dim in before], [(d, out.shape[d]) for d in after])
    return None


def _groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Pair the dims of two shapes that hold the same elements: as few dims at a time as can be."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        one: list[int] = []
        other: list[int] = []
        left = right = 1
        while True:
            if left <= right and i < len(before) and (left < right or not one):
                left *= before[i]
                one.append(i)
                i += 1
            elif j < len(after) and (right < left or not other):
                right *= after[j]
                other.append(j)
                j += 1
            else:
                break
            if left == right and one and other:
                break
        found.append((one, other))
        if not one and not other:
            break
    if found and (i < len(before) or j < len(after)):
        found[-1][0].extend(range(i, len(before)))
        found[-1][1].extend(range(j, len(after)))
    return found


def _slice(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Any) -> Mark | None:
    tensor = args[0]
    dim = (args[1] if len(args) > 1 else 0) % tensor.ndim
    start = (args[2] if len(args) > 2 else 0) or 0
    step = args[4] if len(args) > 4 else 1
    size = tensor.shape[dim]
    start = max(start + size, 0) if start < 0 else min(start, size)
    mark = mark_of(tensor)
    if mark is None or mark.dim != dim or (step == 1 and out.shape[dim] == size):
        return mark
    return part_of(mark, start, start + out.shape[dim]) if step == 1 else None


def _split(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Any) -> Any:
    mark, dim = mark_of(args[0]), (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % args[0].ndim
    if mark is None or mark.dim != dim:
        return mark and [mark] * len(out)
    found, start = [], 0
    for part in out:
        found.append(part_of(mark, start, start + part.shape[dim]))
        start += part.shape[dim]
    return None if None in found else found


def _select(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Any) -> Mark | None:
    mark, dim = mark_of(args[0]), args[1] % args[0].ndim
    if mark is None or mark.dim == dim:
        return None
    return mark.at(mark.dim - (dim < mark.dim))


def _index(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Uniform) -> Mark | None:
    """Entries of one dim, by their numbers."""
    mark, given = mark_of(args[0]), list(args[1])
    at = [dim for dim, index in enumerate(given) if index is not None]
    return mark if mark and len(at) == 1 and at[0] != mark.dim and given[at[0]].ndim == 1 else None


def _unbind(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Any) -> Any:
    found = _select((args[0], args[1] if len(args) > 1 else 0), kwargs, out[0], mark_of, uniform)
    return found and [found] * len(out)


def _cat(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Any, *, stacked: bool = False) -> Mark | None:
    tensors, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    marks = [mark_of(tensor) for tensor in tensors]
    held = [mark for mark in marks if mark]
    if len({mark.dim for mark in held}) != 1 or (not stacked and held[0].dim == dim):
        return None
    if any(mark is None and t.numel() and not uniform(t, held[0].dim) for mark, t in zip(marks, tensors)):
        return None
    return met(held, held[0].dim + (stacked and dim <= held[0].dim))


def _stack(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Any) -> Mark | None:
    return _cat(args, kwargs, out, mark_of, uniform, stacked=True)


def _bmm(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Any) -> Mark | None:
    """Products of matrices, a batch of them if there are three dims."""
    added, one, other = args if len(args) > 2 else (None, *args)
    mine, theirs, last = mark_of(one), mark_of(other), one.ndim - 1
    if mine and theirs:
        found = met([mine, theirs], 0) if last == 2 and mine.dim == theirs.dim == 0 else None
    elif mine:
        found = mine if mine.dim == last - 1 else None
    else:
        found = theirs if theirs and theirs.dim == last else None
    if added is None or found is None:
        return found
    return _pointwise((added, out), {}, out, lambda one: found if one is out else mark_of(one), uniform)


def _over(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Any) -> Mark | None:
    """Along one dim, which stays: softmax, a cumulative sum."""
    mark = mark_of(args[0])
    return mark if mark and args[1] % args[0].ndim != mark.dim else None


def _reduced(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Any) -> Any:
    """Sums, means and the like over some dims."""
    mark, ndim = mark_of(args[0]), args[0].ndim
    given = args[1] if len(args) > 1 else kwargs.get("dim")
    first = out[0] if isinstance(out, (list, tuple)) else out
    if mark is None or given is None or isinstance(given, (bool, float)):
        return None
    dims = {dim % ndim for dim in (given if isinstance(given, (list, tuple)) else [given])}
    if mark.dim in dims or not dims:
        return None
    found = mark if first.ndim == ndim else mark.at(mark.dim - sum(dim < mark.dim for dim in dims))
    return [found] * len(out) if isinstance(out, (list, tuple)) else found


def _largest(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Uniform) -> Any:
    """The largest over a dim, or of two tensors."""
    two = len(args) > 1 and isinstance(args[1], torch.Tensor)
    return (_pointwise if two else _reduced)(args, kwargs, out, mark_of, uniform)


def _normalized(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Any) -> Any:
    mark = mark_of(args[0])
    if mark is None or mark.dim >= args[0].ndim - len(args[1]):
        return None
    return _for_all(mark, out)


def _for_all(mark: Mark, out: Any) -> Any:
    """Return the mark of an operation's result, and of what it makes beside, such as means, if that has its dim."""
    if not isinstance(out, (list, tuple)):
        return mark
    size = out[0].shape[mark.dim]
    fits = [isinstance(one, torch.Tensor) and one.ndim > mark.dim and one.shape[mark.dim] == size for one in out]
    return [mark if fit else None for fit in fits]


def _attention(args: Any, kwargs: Any, out: Any, mark_of: Find, uniform: Uniform) -> Any:
    """Attention of each head by itself: batch × heads × length × size of a head."""
    marks = [mark_of(tensor) for tensor in args[:3]]
    mask = next((one for one in flat((args[3:], kwargs)) if isinstance(one, torch.Tensor)), None)
    if any(mark is None or mark.dim != 1 for mark in marks) or args[0].ndim != 4:
        return None
    if mask is not None:
        masked = mark_of(mask)
        if masked is not None:
            if masked.dim != mask.ndim - 3:
                return None
            marks.append(masked)
        elif mask.ndim > 2 and not uniform(mask, mask.ndim - 3):
            return None
    found = met([mark for mark in marks if mark], 1)
    return _for_all(found, out)


_BY_RULE: tuple[tuple[Callable[..., Any], tuple[str, ...]], ...] = (
    (_same, ("clone", "_to_copy", "alias", "detach", "native_dropout", "dropout", "lift_fresh", "contiguous")),
    (_transpose, ("transpose", "t")),
    (_permute, ("permute",)),
    (_unsqueeze, ("unsqueeze",)),
    (_squeeze, ("squeeze",)),
    (_expand, ("expand",)),
    (_view, ("view", "_unsafe_view", "reshape", "_reshape_alias")),
    (_slice, ("slice",)),
    (_split, ("split", "split_with_sizes")),
    (_select, ("select",)),
    (_index, ("index",)),
    (_unbind, ("unbind",)),
    (_cat, ("cat",)),
    (_stack, ("stack",)),
    (_bmm, ("bmm", "mm", "baddbmm", "addmm")),
    (_over, ("_softmax", "_log_softmax", "cumsum", "_safe_softmax")),
    (_largest, ("max", "min", "maximum", "minimum")),
    (_reduced, ("sum", "mean", "amax", "amin", "var", "var_mean", "logsumexp")),
    (_normalized, ("native_layer_norm", "_fused_rms_norm", "rms_norm")),
    (
        _attention,
        (
            "scaled_dot_product_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_attention_math",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
    ),
)
_RULES = {getattr(aten, name): rule for rule, names in _BY_RULE for name in names if hasattr(aten, name)}

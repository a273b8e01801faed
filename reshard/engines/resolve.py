"""What fills each tensor of an engine's rank files: regions of the checkpoint's tensors, and constants."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..checkpoint.quantization import quantization_of
from ..errors import BadInputError
from ..files.dtypes import FLOATING, holds, itemsize, torch_name
from ..files.header import TensorInfo
from ..resharded.targets import Target
from ..sharding.placement import Explicit, Piece, Replicate, Shard
from ..sharding.regions import Region, covers
from ..sharding.views import View, filled
from ..text import listed, printable
from .copy_plan import SOURCE, Computed, Constant, CopyPlan, Held, RankPlan, Write

__all__ = ["Resolved", "resolve"]

_DEPTH = 8  # temporary tensors between a source and a parameter
_MOST = 1 << 22  # regions of one tensor
# Tensors that engines leave out for good reasons, by the end of their names: tables, masks, and the shapes of matrices
# that are packed (of several that are fused, the engine keeps one).
_LEFT_OUT = (
    *("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", ".attn.bias", ".masked_bias"),
    ".weight_shape",
)
_COMPUTED = "computed "
# What may be cast to numbers that are computed in: those of 8 bits would lack their scales.
_CAST_FROM = {*FLOATING, "float8_e8m0fnu", "uint8", "int16", "int32", "int64"}


@dataclass(frozen=True, slots=True)
class Resolved:
    """The tensors of all rank files. `constants` are values by the names that regions have for them, each with its
    dtype. `taken_for` are source tensors whose bits the engine takes for another dtype of the same size. `left_out` are
    the source tensors that the engine does not read."""

    targets: tuple[Target, ...]
    constants: dict[str, tuple[str, float | int | bool]]
    taken_for: dict[str, str]
    left_out: tuple[str, ...]


@dataclass(slots=True)
class _Findings:
    """What is found on the way, for all ranks: see `Resolved`."""

    tensors: Mapping[str, TensorInfo]
    constants: dict[str, tuple[str, float | int | bool]] = field(default_factory=dict)
    taken_for: dict[str, str] = field(default_factory=dict)


def resolve(plan: CopyPlan, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Resolved:
    """Return the targets of a plan, for a checkpoint that has `tensors` and this configuration.

    Raises BadInputError if a tensor would be wrong: something that fills it is computed, or not known, or nothing
    fills it; or if a source tensor is not used, and there is no good reason for that.
    """
    findings = _Findings(tensors)
    ranks = [_Rank(rank, findings).tensors() for rank in plan.ranks]
    names = dict.fromkeys(name for rank in ranks for name in rank)
    targets = tuple(_target(name, [rank.get(name) for rank in ranks]) for name in names)
    used = defaultdict(set)
    for target in targets:
        for region in target.regions:
            if region.source in tensors:
                used[region.source].add((region.offset, region.strides, region.extent))
    left_out = tuple(sorted(tensors.keys() - used.keys()))
    endings, layers = _left_out_by(config), _layers(config)
    if strange := [name for name in left_out if not (name.endswith(endings) or _is_beyond(name, layers))]:
        raise BadInputError(
            f"{plan.engine['name']} does not read {len(strange)} tensors of the checkpoint: {listed(strange)}",
            hint="its model class may be for another checkpoint; nothing is written, since the result may be wrong",
        )
    partly = [
        name
        for name, boxes in used.items()
        if sum(math.prod(e for e, s in zip(extent, strides) if s or e == 1) for _, strides, extent in boxes)
        < math.prod(tensors[name].shape)
    ]
    if partly:
        raise BadInputError(f"{plan.engine['name']} reads {len(partly)} tensors only in part: {listed(partly)}")
    return Resolved(targets, findings.constants, findings.taken_for, left_out)


def _left_out_by(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return how the names of tensors end that the engine may leave out: a tied head too, and an order of activity that
    is none."""
    quantization = quantization_of(config) or {}
    return (
        *_LEFT_OUT,
        *(() if _told(config, "tie_word_embeddings") is False else ("lm_head.weight",)),
        *((".g_idx",) if quantization.get("desc_act") is False else ()),
    )


def _told(config: Mapping[str, Any], key: str) -> Any:
    """Return what a configuration says, or that of its text model."""
    inner = config.get("text_config")
    return config.get(key, inner.get(key) if isinstance(inner, Mapping) else None)


def _layers(config: Mapping[str, Any]) -> int | None:
    """Return the number of layers that the configuration gives the model."""
    found = _told(config, "num_hidden_layers")
    return found if type(found) is int else None


def _is_beyond(name: str, layers: int | None) -> bool:
    """Whether a tensor is of a layer after the model's last, as those for multi-token prediction are."""
    match = re.search(r"(?:^|\.)layers\.(\d{1,6})\.", name)
    return layers is not None and match is not None and int(match[1]) >= layers


def _target(name: str, ranks: Sequence[Target | None]) -> Target:
    """Put the parts of all ranks one after the other, as if they were one parameter that is cut along dim 0."""
    held = [rank for rank in ranks if rank is not None]
    first = held[0]
    if len({rank.dtype for rank in held}) > 1:
        raise BadInputError(f"{printable(name)}: the ranks have it in different dtypes")
    if len(held) == len(ranks) and all(rank == first for rank in held):
        return first
    if not first.shape:
        if any(rank != first for rank in held):
            raise BadInputError(f"{printable(name)}: is one number, and the ranks have different ones")
        whole = Piece((), (), ())
        absent_or_not = tuple(() if rank else (0,) for rank in ranks)
        return replace(first, placement=Explicit(absent_or_not, tuple((whole,) if rank else () for rank in ranks)))
    at, regions, shapes, boxes = 0, list[Region](), [], []
    for rank in ranks:
        shape = rank.shape if rank else (0, *first.shape[1:])
        shapes.append(shape)
        start = (at, *(0 for _ in shape[1:]))
        boxes.append((Piece(start, shape, (0,) * len(shape)),) if rank else ())
        for region in rank.regions if rank else ():
            moved = (region.target_start[0] + at, *region.target_start[1:])
            regions.append(replace(region, target_start=moved))
        at += shape[0]
    even = len(set(shapes)) == 1
    placement = Shard(0) if even else Explicit(tuple(shapes), tuple(boxes))
    return replace(first, shape=(at, *first.shape[1:]), regions=tuple(regions), placement=placement)


class _Rank:
    """One rank's plan, looked up by storage."""

    def __init__(self, plan: RankPlan, findings: _Findings) -> None:
        self._plan, self._findings = plan, findings
        self._writes: dict[str, list[tuple[int, Write]]] = defaultdict(list)
        for number, write in enumerate(plan.writes):
            self._writes[write.into.storage].append((number, write))

    def tensors(self) -> dict[str, Target]:
        return {name: self._tensor(name, held) for name, held in self._plan.tensors.items()}

    def _tensor(self, name: str, held: Held) -> Target:
        try:
            regions = self._filled(held, len(self._plan.writes), 0)
        except ValueError as error:
            raise BadInputError(f"{printable(name)}: its copies cannot be followed: {printable(error)}") from None
        for region in regions:
            if region.source.startswith(_COMPUTED):
                operation = region.source.split("\0")[0].removeprefix(_COMPUTED)
                raise BadInputError(
                    f"{printable(name)}: the engine computes values for it ({printable(operation)}), which no copy is"
                )
        if not covers(regions, held.view.shape):
            raise BadInputError(f"{printable(name)}: the engine does not load all of it from this checkpoint")
        found = tuple(self._named(name, region, held.dtype) for region in regions)
        found = tuple(sorted(found, key=lambda region: region.target_start))
        return Target(name, held.view.shape, held.dtype, Replicate(), found)

    def _filled(self, held: Held, before: int, depth: int) -> list[Region]:
        """Return what fills a view of a storage by all writes `before` a number. A region's source has the dtypes that
        its elements went through behind its name."""
        if depth > _DEPTH:
            raise ValueError("too many copies of copies")
        of_storage = self._writes[held.storage]
        writes = []
        for number, write in of_storage[: bisect_left(of_storage, before, key=lambda of: of[0])]:
            if itemsize(write.into.dtype) != itemsize(held.dtype):
                raise ValueError(f"{write.into.dtype} written into {held.dtype}")
            writes.append((write.into.view, self._content(write, number, depth)))
        found = filled(held.view, writes)
        if len(found) > _MOST:
            raise ValueError(f"{len(found)} pieces")
        return found

    def _content(self, write: Write, number: int, depth: int) -> Sequence[Region]:
        shape, what, dtype = write.into.view.shape, write.what, write.into.dtype
        start = (0,) * len(shape)
        if isinstance(what, Computed):
            return [Region(f"{_COMPUTED}{what.operation}\0{dtype}\0{dtype}", 0, start, shape, start)]
        if isinstance(what, Constant):
            name = f"constant {what.value!r}"
            return [Region(f"{name}\0{dtype}\0{dtype}", 0, start, shape, start)]
        if what.storage.startswith(SOURCE):
            self._check_source(what)
            name = f"{what.storage}\0{what.dtype}\0{dtype}"
            return [Region(name, what.view.offset, what.view.strides, shape, start)]
        if 0 in what.view.strides:
            what, stretched = _unstretched(what)
        else:
            stretched = ()
        found = self._filled(what, number, depth + 1)
        through = f"\0{what.dtype}\0{dtype}"
        return [_stretched(replace(region, source=region.source + through), stretched, shape) for region in found]

    def _check_source(self, what: Held) -> None:
        info = self._findings.tensors.get(what.storage.removeprefix(SOURCE))
        if info is None or "\0" in info.name:
            raise ValueError(f"{what.storage!r:.200} is no tensor of the checkpoint")
        stored = torch_name(info.dtype, tensor=info.name)
        if what.view.last >= math.prod(info.shape) or itemsize(stored) != itemsize(what.dtype):
            raise ValueError(f"reads beyond {info.name!r:.200}, or as {what.dtype}")

    def _named(self, name: str, region: Region, dtype: str) -> Region:
        """Give a region the name of its source tensor, or of a constant. Elements may be cast once."""
        source, *chain = region.source.split("\0")
        casts = _casts([*chain, dtype])
        if source.startswith("constant "):
            if len(casts) > 1:
                raise BadInputError(f"{printable(name)}: a constant goes through {' and '.join(casts)}")
            called = f"{source} {dtype}"
            if called in self._findings.tensors:
                raise BadInputError(f"{printable(called)}: a tensor of the checkpoint is called as a constant is")
            self._findings.constants[called] = (dtype, _value(source.removeprefix("constant ")))
            return replace(region, source=called)
        own = source.removeprefix(SOURCE)
        stored = torch_name(self._findings.tensors[own].dtype, tensor=own)
        read = casts[0]
        if len(casts) > 2 or (len(casts) == 2 and not (casts[0] in _CAST_FROM and casts[1] in FLOATING)):
            raise BadInputError(f"{printable(name)}: {printable(own)} is cast from {' to '.join(casts)}")
        if read != stored:
            if self._findings.taken_for.setdefault(own, read) != read:
                raise BadInputError(f"{printable(own)}: is taken for {read}, and for {self._findings.taken_for[own]}")
        elif own in self._findings.taken_for:
            raise BadInputError(f"{printable(own)}: is taken for {read}, and for {self._findings.taken_for[own]}")
        return replace(region, source=own)


def _casts(chain: Sequence[str]) -> list[str]:
    """Return the dtypes that elements really go through.

    A chain has, for each copy, the dtype that it reads and the one that it writes, and at its end the one that the
    tensor has. In between, the same bits are taken for another dtype.
    """
    found: list[str] = []
    for read, written in zip([*chain[::2]], [*chain[1::2], chain[-1]]):
        if found and found[-1] != read:
            if len(found) > 1:
                return [*found, read]
            found = [read]
        found += [one for one in dict.fromkeys((read, written)) if not found or found[-1] != one]
    while len(found) > 2 and holds(found[1], found[0]):
        del found[1]
    return found


def _value(text: str) -> float | int | bool:
    if text in ("True", "False"):
        return text == "True"
    try:
        return int(text)
    except ValueError:
        return float(text)


def _unstretched(what: Held) -> tuple[Held, tuple[int, ...]]:
    """Take dims out of a view along which it repeats one element, and return these too."""
    dims = tuple(dim for dim, (size, stride) in enumerate(zip(what.view.shape, what.view.strides)) if not stride)
    shape = tuple(1 if dim in dims else size for dim, size in enumerate(what.view.shape))
    return replace(what, view=View(what.view.offset, shape, what.view.strides)), dims


def _stretched(region: Region, dims: Iterable[int], shape: Sequence[int]) -> Region:
    extent, strides = list(region.extent), list(region.strides)
    for dim in dims:
        extent[dim], strides[dim] = shape[dim], 0
    return replace(region, extent=tuple(extent), strides=tuple(strides))

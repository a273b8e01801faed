"""The search for the first module that computes something else than in the single-process model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from reshard.operations.reference import EXACT, distance, largest, rounding
from reshard.resharded.manifest import Manifest, read_manifest
from reshard.resharded.targets import Target
from reshard.sharding.placement import pieces, shard_bounds
from reshard.strategies import AllReduceParallel
from reshard.strategies.registry import ALL_PARALLEL_STYLES

from ..model.full_tensor import part_of
from ..model.shares import replicas_of
from .traces import Moment, Trace

__all__ = ["Altered", "Difference", "Layers", "altered_in", "first_difference"]

_SEQUENCE = 1  # dim of activations [batch, sequence, …]
_NO_MATTER = {"transformers_version", "architectures", "dtype", "torch_dtype"}


@dataclass(frozen=True, slots=True)
class Altered:
    """A parameter that differs from the source: the number of different elements, by rank file."""

    name: str
    files: dict[str, int]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first difference between two forwards.

    The inputs of `module` agree, and its own work differs. `seen` is where that shows: its output, or what it gives to
    a module inside it. `ranks` see it. `style` is the module's. `altered` are its parameters that differ from the
    source. `configuration` are fields of `config.json` that differ: (here, in the source). If both are empty, a style
    or a kernel is wrong.
    """

    module: str
    seen: str
    ranks: tuple[int, ...]
    world_size: int
    max_abs: float
    max_rel: float
    tolerance: float
    style: str | None
    altered: tuple[Altered, ...]
    configuration: dict[str, tuple[Any, Any]]


@dataclass(frozen=True, slots=True)
class Layers:
    """Rank 0's single-process model, and the trace of its forward. If rounding explains more than EXACT, `exact` is the
    trace of another run, which differs by rounding. `weights` is the same model with plain weights."""

    single: Any
    weights: Any
    trace: Trace
    exact: Trace | None


@dataclass(frozen=True, slots=True)
class _Expected:
    """The header of a reference tensor, which rank 0 sends to all ranks before the tensor."""

    moment: Moment
    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    tolerance: float


def first_difference(model: Any, ours: Trace, layers: Layers | None) -> Difference | None:
    """Compare moment by moment, in the forward's order. Only rank 0 has `layers`. Call it on every rank; the result is
    the same on all.

    A rank compares what it holds: a full tensor, its part of the features of a module whose weight is cut, or its part
    of the sequence. A tensor of any other form is skipped, and so are partial sums before they are reduced: then the
    next module that can be compared shows the difference.
    """
    manifest = read_manifest(Path(model.name_or_path))
    told: list[Any] = [layers and list(_expected(ours, layers, manifest))]
    dist.broadcast_object_list(told, src=0, device=model.device)
    for expected in told[0]:
        whole = torch.empty(expected.shape, dtype=expected.dtype, device=model.device)
        if layers:
            whole.copy_(layers.trace[expected.moment][expected.number])
        dist.broadcast(whole, src=0)
        found = ours.get(expected.moment, ())
        error = _error(model, expected.moment, found[expected.number], whole) if len(found) > expected.number else None
        errors = _from_all(error or (0.0, 0.0), model.device)
        differing = tuple(rank for rank, (_, relative) in enumerate(errors) if not relative <= expected.tolerance)
        if differing:
            return _explain(model, manifest, layers, expected, differing, errors)
    return None


def _expected(ours: Trace, layers: Layers, manifest: Manifest) -> Iterator[_Expected]:
    """Yield the moments that both models have, in rank 0's order."""
    partial_sums = [
        f"{name}."
        for name, style in manifest.hooks.items()
        if style in ALL_PARALLEL_STYLES and isinstance(ALL_PARALLEL_STYLES.find(style), AllReduceParallel)
    ]
    for moment in ours:
        if moment not in layers.trace or any(moment.module.startswith(name) for name in partial_sums):
            continue
        for number, tensor in enumerate(layers.trace[moment]):
            tolerance = EXACT
            if layers.exact is not None and moment in layers.exact:
                tolerance = rounding(tensor.float(), layers.exact[moment][number].float())
            yield _Expected(moment, number, tuple(tensor.shape), tensor.dtype, tolerance)


def _error(model: Any, moment: Moment, mine: torch.Tensor, whole: torch.Tensor) -> tuple[float, float] | None:
    """Return this rank's largest error, absolute and relative to the full tensor's largest value."""
    part = _part(model, moment, mine.shape, whole)
    if part is None:
        return None
    most, _ = distance(mine, part)
    return most, most / (largest(whole.float()) or 1.0)


def _part(model: Any, moment: Moment, shape: torch.Size, whole: torch.Tensor) -> torch.Tensor | None:
    """Return the part of the full tensor that this rank should hold, by the part's shape; None if that is unclear."""
    if shape == whole.shape:
        return whole
    dims = [dim for dim in range(whole.ndim) if len(shape) == whole.ndim and shape[dim] != whole.shape[dim]]
    if len(dims) != 1:
        return None
    rank, world_size = _place(model)
    if dims == [whole.ndim - 1]:
        held = _features(model, moment, rank, world_size)
        if held is not None and len(held) == shape[-1]:
            return whole[..., held.to(whole.device)]
    if dims == [_SEQUENCE]:
        topology = model._reshard_manifest.topology
        start, stop = shard_bounds(whole.shape[_SEQUENCE], rank=rank // topology.tp_row, world_size=topology.tp)
        if stop - start == shape[_SEQUENCE]:
            return whole.narrow(_SEQUENCE, start, stop - start)
    return None


def _features(model: Any, moment: Moment, rank: int, world_size: int) -> torch.Tensor | None:
    """Return the indices of the features that a rank has of a linear layer or embedding, by its weight's placement."""
    target: Target | None = model._reshard_targets.get(f"{moment.module}.weight".lstrip("."))
    if target is None or len(target.shape) != 2:
        return None
    module = model.get_submodule(moment.module)
    outputs_last = isinstance(module, (nn.Embedding, Conv1D))
    axis = int(outputs_last) if moment.side == "output" else int(not outputs_last)
    found = pieces(target.placement, target.shape, rank=rank, world_size=world_size)
    if any(piece.extent[1 - axis] != target.shape[1 - axis] for piece in found):
        return None
    ranges = sorted((piece.local_start[axis], piece.start[axis], piece.extent[axis]) for piece in found)
    return torch.tensor([place for _, start, size in ranges for place in range(start, start + size)], dtype=torch.long)


def _place(model: Any) -> tuple[int, int]:
    """Return this rank's number in its replica, and the number of ranks that the model is cut over."""
    replicas = replicas_of(model)
    return replicas.rank, replicas.size


def _from_all(pair: tuple[float, float], device: torch.device) -> list[tuple[float, float]]:
    mine = torch.tensor(pair, dtype=torch.float64, device=device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return [(part[0].item(), part[1].item()) for part in parts]


def _explain(
    model: Any,
    manifest: Manifest,
    layers: Layers | None,
    expected: _Expected,
    differing: tuple[int, ...],
    errors: list[tuple[float, float]],
) -> Difference:
    """Return the module whose work differs, and which of its parameters differ from the source. A collective."""
    moment = expected.moment
    culprit = moment.module if moment.side == "output" else moment.caller
    seen = "its output" if moment.side == "output" else f"the input of {moment.module}"
    prefix = f"{culprit}." if culprit else ""
    configuration: list[Any] = [layers and _apart(_fields(model), _fields(layers.single))]
    dist.broadcast_object_list(configuration, src=0, device=model.device)
    worst = max(differing, key=lambda rank: errors[rank][1])
    return Difference(
        module=culprit,
        seen=seen,
        ranks=differing,
        world_size=dist.get_world_size(),
        max_abs=errors[worst][0],
        max_rel=errors[worst][1],
        tolerance=expected.tolerance,
        style=manifest.hooks.get(culprit),
        altered=altered_in(model, layers, prefix),
        configuration=configuration[0],
    )


def altered_in(model: Any, layers: Layers | None, prefix: str = "") -> tuple[Altered, ...]:
    """Return the parameters and buffers under a prefix that differ from the source; a tied one has its owner's name.
    Only rank 0 has `layers`. Call it on every rank; the result is the same on all."""
    manifest: Manifest = model._reshard_manifest
    # Only the model's own list has tied names: a file holds their owner.
    names = dict.fromkeys(t.name for name, t in model._reshard_targets.items() if name.startswith(prefix))
    theirs = layers.weights.state_dict() if layers else None
    found = [_altered(model, manifest, name, theirs) for name in names]
    return tuple(one for one in found if one)


def _altered(model: Any, manifest: Manifest, name: str, theirs: dict[str, torch.Tensor] | None) -> Altered | None:
    """Compare a parameter, rank by rank, with the source's, which rank 0 has. A collective."""
    target: Target = model._reshard_targets[name]
    tensor = part_of(model, name)
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    whole = torch.empty(target.shape, dtype=torch.float32, device=local.device)
    if theirs is not None:
        whole.copy_(theirs[name])
    dist.broadcast(whole, src=0)
    wrong = 0
    rank, world_size = _place(model)
    for piece in pieces(target.placement, target.shape, rank=rank, world_size=world_size):
        there = tuple(slice(start, start + extent) for start, extent in zip(piece.start, piece.extent))
        here = tuple(slice(start, start + extent) for start, extent in zip(piece.local_start, piece.extent))
        one, other = whole[there], local[here].float()
        wrong += int(((one != other) & ~(one.isnan() & other.isnan())).sum())
    counts = [int(found) for found, _ in _from_all((wrong, 0), local.device)]
    # The first replica's ranks only: the others hold the same files.
    files = {record.name: count for record, count in zip(manifest.rank_files, counts) if count}
    return Altered(name, files) if files else None


def _fields(model: Any) -> dict[str, Any]:
    return json.loads(model.config.to_json_string(use_diff=False))


def _apart(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ between two configurations, by path: (here, in the source)."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted((ours.keys() | theirs.keys()) - _NO_MATTER):
        if key.startswith("_"):
            continue
        one, other = ours.get(key), theirs.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found |= _apart(one, other, f"{prefix}{key}.")
        elif one != other:
            found[f"{prefix}{key}"] = one, other
    return found

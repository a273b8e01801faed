"""Where the elements of each parameter come from: transformers' own renamings and conversions, run on symbolic tensors.

A quantized matrix takes part as the matrix that it stands for. Where the conversions put it, there its tensors follow.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from ...checkpoint.naming import Naming
from ...checkpoint.source import Source
from ...errors import BadInputError
from ...files.dtypes import FLOATING, torch_name
from ...sharding.placement import Piece
from ...sharding.regions import Region, contiguous_strides, covers, is_run
from ...strategies.symbolic import NotACopyError, RegionTensor, casts_left_to_the_copy
from ...text import listed, printable
from ...transforms.bundle import ONE, Member, Quantized, Role, matrix_at, member_box, member_of, member_shape
from .quantized import Matrices, Matrix

__all__ = ["Held", "Sources", "map_sources"]

Blocks = tuple[tuple[int, ...], ...]

_OF_CACHE = ("k_scale", "v_scale", "kv_scale")  # scales of a quantized KV cache, some of them beside k_proj's weight


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of a bundle, as the rank files hold it before they are cut."""

    shape: tuple[int, ...]
    dtype: str
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Sources:
    """The `regions` of each parameter that the checkpoint has, and its `unused` tensors, which no parameter takes.

    `bundles` are the parameters that are quantized: their regions are those of matrices that are not in the files. The
    tensors of bundles are in `held`.
    """

    regions: dict[str, tuple[Region, ...]]
    unused: tuple[str, ...]
    bundles: dict[str, Quantized] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)


@dataclass(slots=True)
class _Group:
    """What one conversion makes of its source tensors. `first` is the parameter that names it."""

    conversion: Any
    taken: list[str]


def map_sources(naming: Naming, matrices: Matrices, model: Any, source: Source) -> Sources:
    """Run transformers' renamings and conversions. They see whole tensors, so they come before any cut.

    The grouping follows `convert_and_load_state_dict_in_model`.

    Raises BadInputError if a conversion computes values, or makes something else than the model wants.
    """
    from transformers.core_model_loading import dot_natural_key

    wanted = model.state_dict()
    found: dict[str, RegionTensor] = {}
    groups: dict[str, _Group] = {}
    unused, empty = [], []
    parts: dict[str, Matrix] = {}
    quantized = set(matrices.names)
    for key in sorted((source.tensors.keys() - matrices.taken) | quantized, key=dot_natural_key):
        target, pattern = naming.target(key)
        if target is None:  # DeepSeek's layer for multi-token prediction, for example
            unused += sorted(matrices.tensors(key)) if key in quantized else [key]
            continue
        if key in quantized:
            shape = tuple(wanted[target].shape)
            parts[key] = matrices.matrix(key, shape, is_part=pattern is not None)
            tensor = RegionTensor.of_source(key, parts[key].fit.size if pattern else shape, wanted[target].dtype)
        else:
            info = source.tensors[key]
            if 0 in info.shape and wanted[target].numel():
                empty.append(key)
            tensor = RegionTensor.of_source(key, info.shape, getattr(torch, torch_name(info.dtype, tensor=key)))
        if pattern is None:
            if target in found:
                raise BadInputError(f"{printable(key)}: a second source tensor for parameter {printable(target)}")
            found[target] = tensor
        else:
            if target not in groups:
                groups[target] = _Group(deepcopy(naming.converters[pattern]), [])
            groups[target].conversion.add_tensor(target, key.removeprefix(naming.prefix), pattern, tensor)
            groups[target].taken.append(key)
    if empty:
        raise BadInputError(
            f"{len(empty)} tensors of the checkpoint are empty, as DeepSpeed ZeRO-3 leaves them where the parameters"
            f" are not gathered before saving: {listed(empty)}",
            hint="write them with DeepSpeed's zero_to_fp32.py, or save again with"
            " stage3_gather_16bit_weights_on_model_save",
        )
    for first, group in groups.items():
        found.update(_convert(first, group, model))
    regions = {name: _regions(name, tensor, wanted) for name, tensor in found.items()}
    bundles: dict[str, Quantized] = {}
    held: dict[str, Held] = {}
    for name, of in regions.items():
        if any(region.source in parts for region in of):
            _check_linear(model, name)
            bundles[name], tensors = _bundle(name, of, tuple(wanted[name].shape), parts, source)
            held |= tensors
    for name in held:
        if name in wanted and name not in bundles:
            raise BadInputError(f"{printable(name)}: is a tensor of a quantized parameter, and a parameter itself")
    used = {region.source for tensor in held.values() for region in tensor.regions}
    plain = {name: found for name, found in regions.items() if name not in bundles}
    strangers = sorted({*unused, *matrices.taken} - used)
    _refuse_strangers(strangers, {name.rpartition(".")[0] for name in parts}, _bare(plain, wanted, source))
    return Sources(regions, tuple(unused), bundles, held)


def _regions(name: str, tensor: RegionTensor, wanted: Mapping[str, torch.Tensor]) -> tuple[Region, ...]:
    if name not in wanted:
        raise BadInputError(f"{printable(name)}: made by a conversion, but the model has no such parameter")
    if tuple(tensor.shape) != tuple(wanted[name].shape):
        raise BadInputError(
            f"{printable(name)}: the model wants shape {list(wanted[name].shape)},"
            f" the checkpoint has {list(tensor.shape)}"
        )
    if not covers(tensor.regions, tuple(tensor.shape)):
        raise BadInputError(f"{printable(name)}: the checkpoint's tensors do not fill it exactly")
    return tensor.regions


def _bundle(
    name: str, regions: Sequence[Region], shape: tuple[int, ...], parts: Mapping[str, Matrix], source: Source
) -> tuple[Quantized, dict[str, Held]]:
    """Return a quantized parameter, and its tensors: each matrix's are put where its entries belong."""
    if any(region.source not in parts for region in regions):
        raise BadInputError(f"{printable(name)}: is made of matrices that are quantized, and of others that are not")
    if len({parts[region.source].fit.kind for region in regions}) > 1:
        raise BadInputError(f"{printable(name)}: is made of matrices that are quantized in different ways")
    first = parts[regions[0].source].fit
    blocks = _blocks(name, regions, shape)
    members: dict[str, Member] = {}
    held: dict[str, Held] = {}
    for suffix, role in first.roles.items():
        member = _member(suffix, role, regions, parts, blocks)
        called = _member_name(name, suffix, first.format.parameter)
        whole, found = member_shape(member, blocks), _entries(member, regions, parts, blocks)
        dtypes = {source.tensors[region.source].dtype for region in found}
        if not covers(found, whole) or len(dtypes) > 1:
            raise BadInputError(
                f"{printable(called)}: the matrices of this parameter have tensors of different lengths or dtypes"
            )
        members[called], held[called] = member, Held(whole, torch_name(dtypes.pop(), tensor=called), found)
    return Quantized(first.format.name, first.options, members, blocks), held


def _member(suffix: str, role: Role, regions: Sequence[Region], parts: Mapping[str, Matrix], blocks: Blocks) -> Member:
    extents = [parts[region.source].fit.shapes[suffix] for region in regions]
    if len(set(extents)) > 1 and all(at.unit == ONE for at in role.dims or ()):
        in_order = sorted(zip(regions, extents), key=lambda at: matrix_at(at[0].target_start, blocks))
        return Member(suffix, (), tuple(math.prod(extent) for _, extent in in_order))
    return member_of(role, len(blocks) - 2)


def _entries(
    member: Member, regions: Sequence[Region], parts: Mapping[str, Matrix], blocks: Blocks
) -> tuple[Region, ...]:
    """Return where the tensor of each matrix is in that of the bundle."""
    dims, outer, found = len(member_shape(member, blocks)), len(blocks) - 2, []
    starts: dict[tuple[int, ...], tuple[int, ...]] = {}  # of the entries of a block: the same for all experts
    for region in regions:
        matrix = parts[region.source]
        extent = matrix.fit.shapes[member.role]
        block = region.target_start if member.lengths else region.target_start[outer:]
        if block not in starts:
            box = member_box(member, Piece(region.target_start, region.extent, region.target_start), blocks)
            starts[block] = tuple(low for low, _ in box)
        if member.lengths:
            extent, start = (math.prod(extent),), starts[block]
        else:
            extent = (1,) * (dims - len(extent)) + extent
            start = region.target_start[:outer] + starts[block][outer:]
        found.append(Region(matrix.stem + member.role, 0, contiguous_strides(extent), extent, start))
    return tuple(found)


def _member_name(name: str, suffix: str, parameter: str) -> str:
    """Name a tensor of a bundle: as the format does, or after the parameter that stands for many matrices."""
    if parameter and not name.endswith(parameter):
        return name + suffix.removeprefix(parameter)
    return name.removesuffix(parameter) + suffix


def _blocks(name: str, regions: Iterable[Region], shape: tuple[int, ...]) -> Blocks:
    """Return the sizes of the matrices that stand side by side in a parameter, along each of its dims.

    Raises BadInputError if a matrix is not in it as a whole: its entries could not be told apart.
    """
    if not all(is_run(region) and region.offset == 0 for region in regions):
        raise BadInputError(f"{printable(name)}: the model rearranges its quantized matrices, which cannot be followed")
    blocks: list[tuple[int, ...]] = [(size,) for size in shape[:-2]]
    for dim, size in list(enumerate(shape))[-2:]:
        starts = sorted({region.target_start[dim] for region in regions})
        blocks.append(tuple(stop - start for start, stop in zip(starts, [*starts[1:], size])))
    return tuple(blocks)


def _check_linear(model: Any, name: str) -> None:
    module = model.get_submodule(name.rpartition(".")[0])
    if type(module).__name__ == "Conv1D":
        raise BadInputError(f"{printable(name)}: is quantized, and the model has its matrix transposed (Conv1D)")


def _bare(regions: Mapping[str, Sequence[Region]], wanted: Mapping[str, torch.Tensor], source: Source) -> set[str]:
    """Return the modules whose plain weights are numbers of few bits."""
    return {
        region.source.rpartition(".")[0]
        for name, found in regions.items()
        if wanted[name].dtype.is_floating_point
        for region in found
        if region.source in source.tensors
        and torch_name(source.tensors[region.source].dtype, tensor=region.source) not in FLOATING
    }


def _refuse_strangers(unused: Iterable[str], quantized: Container[str], bare: Container[str]) -> None:
    """Refuse a tensor beside quantized weights that nobody asks for: it may change their values."""
    for key in unused:
        module, _, own = key.rpartition(".")
        if own in _OF_CACHE:
            continue
        if module and module in bare:
            raise BadInputError(
                f"{printable(key)}: stands beside a weight of 8 bits or fewer, and config.json has no"
                " quantization_config that tells what it is for",
                hint="the weight would be loaded without it",
            )
        if module and module in quantized:
            raise BadInputError(f"{printable(key)}: stands beside a quantized weight, and is not known to its format")


def _convert(first: str, group: _Group, model: Any) -> dict[str, RegionTensor]:
    operations = ", ".join(type(operation).__name__ for operation in group.conversion.operations)
    try:
        with casts_left_to_the_copy():
            result = group.conversion.convert(first, model=model, config=model.config)
    except NotACopyError as error:
        raise BadInputError(
            f"{printable(first)}: its conversion ({operations}) computes values ({error}), which is not supported yet"
        ) from None
    except Exception as error:
        raise BadInputError(
            f"{printable(first)}: cannot be made from {printable(group.taken[0])} and {len(group.taken) - 1} more"
            f" ({operations}): {printable(error)}"
        ) from None
    return {name: value[0] if isinstance(value, list) else value for name, value in result.items()}

"""The checkpoint that dequantising makes of a quantized one: the plain one that its matrices stand for."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from ..checkpoint.architecture import expected_dtypes, meta_model
from ..checkpoint.naming import Naming
from ..checkpoint.quantization import quantization_of
from ..checkpoint.source import Source, dtype_of
from ..errors import BadInputError
from ..files.dtypes import FLOATING, torch_name
from ..resharded.derived import Computed, Derived, ReadInput, config_text, derived_files, header_entry
from ..resharded.targets import LocalTensor
from ..sharding.regions import Region, contiguous_strides
from ..text import printable
from ..transforms.bundle import Quantized, member_of
from ..transforms.dequantise import Format, values_of
from .model.quantized import Matrices, Matrix

__all__ = ["dequantised"]


def dequantised(source: Source, *, dtype: str | None = None) -> Derived:
    """Return the checkpoint of which `source` is quantized: each matrix in the model's dtype, or in `dtype`.

    All else stays as it is, unless `dtype` (a torch name) is given: then it is stored in that, except what the model
    keeps in fp32. Scales of activations are left out.

    Raises BadInputError if it is not quantized, or in a way that is not known.
    """
    config = quantization_of(source.config)
    if config is None:
        raise BadInputError(f"{printable(source.root)}: is not quantized", hint="leave out --dequantize")
    model_dtype = dtype or dtype_of(source)
    model, matrices = meta_model(source.root, dtype=model_dtype), Matrices(source)
    naming = Naming(model, (source.tensors.keys() - matrices.taken) | set(matrices.names))
    wanted, shapes = expected_dtypes(model, model_dtype), model.state_dict()

    def wants(name: str) -> str:
        target = naming.target(name)[0]
        return str(wanted[target]).removeprefix("torch.") if target else model_dtype

    found: dict[str, Matrix] = {}  # by the tensor that takes the place of the matrix's first
    names: dict[str, str] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for name in matrices.names:
        target, pattern = naming.target(name)
        part = pattern is not None or target is None
        matrix = matrices.matrix(name, shapes[target].shape if target else (0, 0), is_part=part)
        first = matrix.stem + next(iter(matrix.fit.roles))
        found[first], names[first] = matrix, name
        sizes[first] = matrix.fit.size if part else tuple(shapes[target or ""].shape)
    files: dict[str, list[LocalTensor]] = {}
    computed: dict[str, Computed] = {}
    for file in source.files:
        entries = files.setdefault(file.name, [])
        for info in file.header.tensors:
            stored = torch_name(info.dtype, tensor=info.name)
            if info.name in found:
                name, shape, matrix = names[info.name], sizes[info.name], found[info.name]
                entries.append(header_entry(name, shape, wants(name)))
                computed[name] = _computed(name, matrix, shape, wants(name), source)
            elif info.name not in matrices.taken:
                cast = dtype is not None and stored in FLOATING
                entries.append(header_entry(info.name, info.shape, wants(info.name) if cast else stored))
    written = {key: value for key, value in source.config.items() if key != "quantization_config"}
    text = written.get("text_config")
    if isinstance(text, dict):
        written["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    if dtype is not None:
        written.pop("torch_dtype", None)
        written["dtype"] = dtype
    says = {"quantized": None, "dequantized": str(config.get("quant_method")), "experts": False, "dtype": dtype}
    return Derived(source, derived_files(source, files, written), computed, config_text(written), says)


def _computed(name: str, matrix: Matrix, shape: tuple[int, ...], dtype: str, source: Source) -> Computed:
    fit, outer = matrix.fit, len(shape) - 2
    members, inputs = {}, []
    for suffix, seen in fit.shapes.items():
        called = matrix.stem + suffix
        members[called] = member_of(fit.roles[suffix], outer)
        region = Region(called, 0, contiguous_strides(seen), seen, (0,) * len(seen))
        stored = torch_name(source.tensors[called].dtype, tensor=called)
        inputs.append(LocalTensor(called, seen, stored, (0,) * len(seen), (region,)))
    bundle = Quantized(fit.format.name, fit.options, members, tuple((size,) for size in shape))
    grid = (math.prod(shape[:-1]), shape[-1])
    make = partial(_make, fit.format, bundle, getattr(torch, dtype), name)
    return Computed(dtype, grid, tuple(inputs), make, f"{fit.kind} {shape} {dtype}")


def _make(
    form: Format,
    bundle: Quantized,
    dtype: torch.dtype,
    name: str,
    read: ReadInput,
    top: int,
    bottom: int,
    left: int,
    right: int,
) -> Any:
    """Return a box of a dequantised parameter, whose dims before the last are rows."""
    numbers = {member: number for number, member in enumerate(bundle.members)}

    def held(member: str, start: tuple[int, ...], extent: tuple[int, ...]) -> torch.Tensor:
        return read(numbers[member], start, extent)

    found = torch.empty(bottom - top, right - left, dtype=dtype)
    high = sum(bundle.blocks[-2])
    at = top
    while at < bottom:
        number, first = divmod(at, high)
        last = min(high, first + bottom - at)
        place = _index(number, [sum(along) for along in bundle.blocks[:-2]])
        for start, values in values_of(form, bundle, place, (first, last), (left, right), held, name=name):
            found[at - top + start - first : at - top + start - first + len(values)] = values
        at += last - first
    return found


def _index(number: int, sizes: list[int]) -> tuple[int, ...]:
    place = []
    for size in reversed(sizes):
        number, at = divmod(number, size)
        place.append(at)
    return tuple(reversed(place))

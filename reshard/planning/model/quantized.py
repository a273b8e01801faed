"""The quantized matrices of a checkpoint: which there are, by the headers, and the tensors that each is made of."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...checkpoint.quantization import quantization_of
from ...checkpoint.source import Source
from ...errors import BadInputError
from ...files.dtypes import torch_name
from ...files.header import TensorInfo
from ...text import listed, printable
from ...transforms.bundle import ONE, Follows, Role, count
from ...transforms.dequantise import Format, Options
from ...transforms.formats import BY_METHOD

__all__ = ["Fit", "Matrices", "Matrix", "metadata_of"]


@dataclass(frozen=True, slots=True)
class _Scheme:
    """A format with its options. Its roles are asked for once for each size of a matrix."""

    format: Format
    options: Options
    text: str
    known: dict[tuple[int, int] | None, tuple[Role, ...]] = field(default_factory=dict)

    def roles(self, size: tuple[int, int] | None = None) -> tuple[Role, ...]:
        if size not in self.known:
            self.known[size] = tuple(self.format.roles(self.options, size))
        return self.known[size]


@dataclass(frozen=True, slots=True)
class Fit:
    """How a format with its options fits matrices of one `size`, [out, in], or one for each expert.

    `roles` are those of the tensors, by suffix; all have dims. `shapes` are those that the tensors are seen in: their
    dims are those of the role, after the dim of experts if there is one. `kind` is the same for fits that differ in
    sizes only.
    """

    format: Format
    options: Options
    size: tuple[int, int]
    roles: dict[str, Role]
    shapes: dict[str, tuple[int, ...]]
    kind: str


@dataclass(frozen=True, slots=True)
class Matrix:
    """A quantized matrix of the checkpoint: its tensors' names begin with `stem` and end with a suffix of `fit`."""

    stem: str
    fit: Fit


class Matrices:
    """The quantized matrices of a checkpoint. `names` are the parameters that they stand for, as a checkpoint that is
    not quantized would call them; `taken` are all their tensors.

    A module is quantized if the checkpoint has the tensor that marks it. The configuration says how, and no module that
    it leaves out may be.
    """

    def __init__(self, source: Source) -> None:
        """Raises BadInputError if the format is not known, or the configuration and the tensors do not agree."""
        self._source = source
        self._fits: dict[object, Fit] = {}  # matrices that look alike fit alike
        config = quantization_of(source.config)
        schemes = _schemes(source, config) if config is not None else []
        self._of: dict[str, list[tuple[str, _Scheme]]] = defaultdict(list)  # parameter → its name's stem, and schemes
        by_suffix: dict[str, list[_Scheme]] = defaultdict(list)
        for scheme in schemes:
            by_suffix[scheme.roles()[0].suffix].append(scheme)
        for name, info in source.tensors.items():
            for suffix in filter(name.endswith, by_suffix):
                stem, dtype = name.removesuffix(suffix), torch_name(info.dtype, tensor=name)
                for scheme in by_suffix[suffix]:
                    if dtype in scheme.roles()[0].dtypes:
                        self._of[stem + scheme.format.parameter].append((stem, scheme))
        if config is not None:
            self._check(config)
        suffixes = {role.suffix for scheme in schemes for role in scheme.roles()}
        stems = {stem for candidates in self._of.values() for stem, _ in candidates}
        self.taken = {stem + suffix for suffix in suffixes for stem in stems} & source.tensors.keys()

    @property
    def names(self) -> Iterable[str]:
        return self._of.keys()

    def _check(self, config: Mapping[str, Any]) -> None:
        method = printable(config.get("quant_method"))
        if not self._of:
            raise BadInputError(
                f"{printable(self._source.root)}: config.json says that it is quantized by {method}, and no tensor is",
                hint="take quantization_config out of config.json if the weights are plain",
            )
        for key in ("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "exclude_modules"):
            left_out = config.get(key) or ()
            if not isinstance(left_out, (list, tuple)):
                raise BadInputError(f"config.json: {key} of quantization_config is not a list")
            plain = {name for name in left_out if isinstance(name, str) and name}
            wrong = [name for name in self._of if not plain.isdisjoint(_modules_around(name))] if plain else []
            if wrong:
                raise BadInputError(
                    f"config.json: {key} leaves out {listed(wrong)}, and the checkpoint has them quantized"
                )

    def tensors(self, name: str) -> set[str]:
        """Return the tensors of the matrix that a name stands for, by all schemes that it may have."""
        found = {stem + role.suffix for stem, scheme in self._of[name] for role in scheme.roles()}
        return found & self._source.tensors.keys()

    def matrix(self, name: str, shape: Sequence[int], *, is_part: bool) -> Matrix:
        """Return the matrix that a name stands for. The model wants it in `shape`, of two dims, or three with one of
        experts; or wants a parameter in that shape which the matrix `is_part` of, such as one expert of all.

        Raises BadInputError, which says what is missing or does not fit.
        """
        reasons = []
        for stem, scheme in self._of[name]:
            try:
                return Matrix(stem, self._fit(stem, scheme, tuple(shape), is_part=is_part))
            except _NoFit as reason:
                reasons.append(str(reason))
            except (ValueError, TypeError, KeyError, ArithmeticError) as error:
                reasons.append(f"quantization_config makes no sense: {printable(error)}")
        raise BadInputError(f"{printable(name)}: {reasons[0]}")

    def _fit(self, stem: str, scheme: _Scheme, shape: tuple[int, ...], *, is_part: bool) -> Fit:
        infos = {role.suffix: self._source.tensors.get(stem + role.suffix) for role in scheme.roles()}
        look = (scheme.text, shape, is_part, *((info.dtype, info.shape) if info else None for info in infos.values()))
        if look not in self._fits:
            there = {suffix: info for suffix, info in infos.items() if info is not None}
            self._fits[look] = _fitting(there, stem, scheme, shape, is_part=is_part)
        return self._fits[look]


def _modules_around(name: str) -> set[str]:
    """Return the module of a parameter, and all modules around it."""
    words = name.split(".")
    return {".".join(words[:end]) for end in range(1, len(words))}


def _schemes(source: Source, config: Mapping[str, Any]) -> list[_Scheme]:
    method = config.get("quant_method")
    forms = BY_METHOD.get(method, ()) if isinstance(method, str) else ()
    if not forms:
        raise BadInputError(
            f"{printable(source.root)}: quantized by {printable(method)}, which reshard cannot cut",
            hint=f"start from the unquantized checkpoint, or one quantized by {', '.join(sorted(BY_METHOD))}",
        )
    try:
        found = [
            _Scheme(form, options, f"{form.name} {json.dumps(options, sort_keys=True)}")
            for form in forms
            for options in form.options(config, lambda: metadata_of(source))
        ]
        for scheme in found:
            scheme.roles()
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise BadInputError(f"config.json: quantization_config makes no sense: {printable(error)}") from None
    if not found:
        raise BadInputError(
            f"{printable(source.root)}: quantized by {printable(method)} in a way that reshard cannot cut",
            hint="start from the unquantized checkpoint",
        )
    return found


def metadata_of(source: Source) -> dict[str, str]:
    """Return the metadata of a checkpoint's files."""
    found: dict[str, str] = {}
    for file in source.files:
        found |= json.loads(file.header.raw).get("__metadata__") or {}
    return found


class _NoFit(Exception):
    """Why the tensors of a module are not those of a scheme."""


def _fitting(
    tensors: Mapping[str, TensorInfo], stem: str, scheme: _Scheme, shape: Sequence[int], *, is_part: bool
) -> Fit:
    """Fit a scheme to the tensors of a module, by suffix. Raises _NoFit, which says what does not."""
    if len(shape) not in (2, 3):
        raise _NoFit(f"is quantized, and the model wants it in the shape {list(shape)}")
    *lead, rows, columns = shape
    size = (rows, columns)
    if is_part:
        lead, size = [], _size(tensors, scheme.roles(), columns)
    found: dict[str, Role] = {}
    seen: dict[str, tuple[int, ...]] = {}
    for role in scheme.roles(size):
        name, info = printable(stem + role.suffix), tensors.get(role.suffix)
        if info is None:
            if role.needed:
                raise _NoFit(f"is quantized, and {name} is missing")
            continue
        dtype = torch_name(info.dtype, tensor=info.name)
        if dtype not in role.dtypes:
            raise _NoFit(f"{name} is {dtype}, and not {' or '.join(role.dtypes)}")
        if role.dims is None:
            role = replace(role, dims=(Follows(0, ONE, width=math.prod(role.shape or info.shape)), Follows(1, ONE)))
        assert role.dims is not None
        own = (*lead, *(count(at, size[at.dim]) for at in role.dims))
        stored = own if role.shape is None else (*lead, *role.shape)
        if _without_ones(info.shape) != _without_ones(stored):
            raise _NoFit(f"{name} is {list(info.shape)}, and not {list(stored)} for {list(size)}")
        found[role.suffix], seen[role.suffix] = role, own
    return Fit(scheme.format, scheme.options, size, found, seen, f"{scheme.text} {sorted(found)}")


def _size(tensors: Mapping[str, TensorInfo], roles: Sequence[Role], columns: int) -> tuple[int, int]:
    """Return the shape of a matrix by the tensor that follows it most closely: that of its values. If they are in one
    run, it has as many `columns` as the parameter that it is a part of."""
    close = [role for role in roles if role.dims and role.suffix in tensors and ONE not in _units(role)]
    role = min(close, key=lambda role: math.prod(_units(role)))
    assert role.dims is not None
    shape = tensors[role.suffix].shape
    if role.shape is not None:
        return math.prod(shape) * math.prod(_units(role)) // columns, columns
    rows, columns = (
        size * at.unit // at.width for size, at in sorted(zip(shape, role.dims), key=lambda pair: pair[1].dim)
    )
    return rows, columns


def _units(role: Role) -> list[int]:
    return [at.unit for at in role.dims or ()]


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)

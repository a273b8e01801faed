"""The quantized matrices of a checkpoint: which there are, by the headers, and the tensors that each is made of."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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

__all__ = ["Matrices", "Matrix"]

_Scheme = tuple[Format, Options]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A quantized matrix of the checkpoint, [out, in], or one for each expert.

    `roles` are those of its tensors, by suffix; all have dims. `tensors` are their names, and the shape that each is
    seen in: its dims are those of the role, after the dim of experts if there is one. Matrices of one `kind` have the
    same format, options and roles.
    """

    format: Format
    options: Options
    size: tuple[int, int]
    roles: dict[str, Role]
    tensors: dict[str, tuple[str, tuple[int, ...]]]

    @property
    def kind(self) -> str:
        return f"{self.format.name} {options_key(self.options)} {sorted(self.roles)}"


class Matrices:
    """The quantized matrices of a checkpoint. `names` are the parameters that they stand for, as a checkpoint that is
    not quantized would call them; `taken` are all their tensors.

    A module is quantized if the checkpoint has the tensor that marks it. The configuration says how, and no module that
    it leaves out may be.
    """

    def __init__(self, source: Source) -> None:
        """Raises BadInputError if the format is not known, or the configuration and the tensors do not agree."""
        self._source = source
        config = quantization_of(source.config)
        self._schemes = _schemes(source, config) if config is not None else []
        self._of: dict[str, list[tuple[str, _Scheme]]] = defaultdict(list)  # parameter → its name's stem, and schemes
        self.taken: set[str] = set()
        marks = {(form, options_key(options)): form.roles(options, None)[0] for form, options in self._schemes}
        by_suffix: dict[str, list[tuple[Role, _Scheme]]] = defaultdict(list)
        for form, options in self._schemes:
            mark = marks[form, options_key(options)]
            by_suffix[mark.suffix].append((mark, (form, options)))
        for name, info in source.tensors.items():
            for suffix, found in by_suffix.items():
                if name.endswith(suffix):
                    stem = name.removesuffix(suffix)
                    for mark, scheme in found:
                        if torch_name(info.dtype, tensor=name) in mark.dtypes:
                            self._of[stem + scheme[0].parameter].append((stem, scheme))
        if config is not None:
            self._check(config)
        for candidates in self._of.values():
            for stem, (form, options) in candidates:
                roles = form.roles(options, None)
                self.taken.update(stem + role.suffix for role in roles if stem + role.suffix in source.tensors)

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
            wrong = [name for name in self._of if not plain.isdisjoint(_modules_around(name))]
            if wrong:
                raise BadInputError(
                    f"config.json: {key} leaves out {listed(wrong)}, and the checkpoint has them quantized"
                )

    def matrix(self, name: str, shape: Sequence[int], *, is_part: bool) -> Matrix:
        """Return the matrix that a name stands for. The model wants it in `shape`, of two dims, or three with one of
        experts; or wants a parameter in that shape which the matrix `is_part` of, such as one expert of all.

        Raises BadInputError, which says what is missing or does not fit.
        """
        reasons = []
        for stem, (form, options) in self._of[name]:
            try:
                return _fitting(self._source.tensors, stem, form, options, shape, is_part=is_part)
            except _NoFit as reason:
                reasons.append(str(reason))
            except (ValueError, TypeError, KeyError, ArithmeticError) as error:
                reasons.append(f"quantization_config makes no sense: {printable(error)}")
        raise BadInputError(f"{printable(name)}: {reasons[0]}")


def options_key(options: Options) -> str:
    """Return the options as text, to compare them by."""
    return json.dumps(options, sort_keys=True, default=str)


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
        found = [(form, options) for form in forms for options in form.options(config, lambda: _metadata(source))]
        for form, options in found:
            form.roles(options, None)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise BadInputError(f"config.json: quantization_config makes no sense: {printable(error)}") from None
    if not found:
        raise BadInputError(
            f"{printable(source.root)}: quantized by {printable(method)} in a way that reshard cannot cut",
            hint="start from the unquantized checkpoint",
        )
    return found


def _metadata(source: Source) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in source.files:
        found |= json.loads(file.header.raw).get("__metadata__") or {}
    return found


class _NoFit(Exception):
    """Why the tensors of a module are not those of a scheme."""


def _fitting(
    tensors: Mapping[str, TensorInfo],
    stem: str,
    form: Format,
    options: Options,
    shape: Sequence[int],
    *,
    is_part: bool,
) -> Matrix:
    """Return the matrix whose tensors begin with `stem`, if they are those of the format with its options."""
    if len(shape) not in (2, 3):
        raise _NoFit(f"is quantized, and the model wants it in the shape {list(shape)}")
    *lead, rows, columns = shape
    size = (rows, columns)
    if is_part:
        lead, size = [], _size(tensors, stem, form.roles(options, None), columns)
    found: dict[str, Role] = {}
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}
    for role in form.roles(options, size):
        name = stem + role.suffix
        info = tensors.get(name)
        if info is None:
            if role.needed:
                raise _NoFit(f"is quantized, and {printable(name)} is missing")
            continue
        dtype = torch_name(info.dtype, tensor=name)
        if dtype not in role.dtypes:
            raise _NoFit(f"{printable(name)} is {dtype}, and not {' or '.join(role.dtypes)}")
        if role.dims is None:
            role = replace(role, dims=(Follows(0, ONE, width=math.prod(role.shape or info.shape)), Follows(1, ONE)))
        assert role.dims is not None
        own = (*lead, *(count(at, size[at.dim]) for at in role.dims))
        stored = own if role.shape is None else (*lead, *role.shape)
        if _without_ones(info.shape) != _without_ones(stored):
            raise _NoFit(f"{printable(name)} is {list(info.shape)}, and not {list(stored)} for {list(size)}")
        found[role.suffix], seen[role.suffix] = role, (name, own)
    return Matrix(form, options, size, found, seen)


def _size(tensors: Mapping[str, TensorInfo], stem: str, roles: Sequence[Role], columns: int) -> tuple[int, int]:
    """Return the shape of a matrix by the tensor that follows it most closely: that of its values. If they are in one
    run, it has as many `columns` as the parameter that it is a part of."""
    close = [role for role in roles if role.dims and stem + role.suffix in tensors and ONE not in _units(role)]
    role = min(close, key=lambda role: math.prod(_units(role)))
    assert role.dims is not None
    shape = tensors[stem + role.suffix].shape
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

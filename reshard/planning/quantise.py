"""The checkpoint that quantizing makes of another: which matrices, by transformers' own rules, and what of each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..checkpoint.architecture import expected_dtypes, meta_model
from ..checkpoint.naming import Naming
from ..checkpoint.quantization import quantization_of
from ..checkpoint.source import Source, dtype_of
from ..errors import BadInputError, UsageError
from ..files.dtypes import FLOATING, torch_name
from ..files.header import TensorInfo
from ..resharded.derived import Computed, Derived, ReadInput, config_text, derived_files, header_entry
from ..resharded.targets import LocalTensor
from ..sharding.regions import whole
from ..text import listed, printable
from ..transforms.quantise import RECIPES, Made, Read, Recipe
from .quantization_options import configuration_of

__all__ = ["Measure", "needs_whole", "quantised"]

Measure = Callable[[Sequence[tuple[LocalTensor, Callable[[ReadInput], float]]]], Sequence[float]]
"""Find a number for each of some matrices: what a function makes of it, given one that reads boxes of it."""

_TYPICAL = 0.01234567890123456  # as long a text as most numbers have: it is written into a header's sizes
_MUCH = 0.3  # of the weights: a share that a user would not expect
_SKIPPED = {"bitsandbytes": "llm_int8_skip_modules", "fp8": "modules_to_not_convert"}


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The source `tensors` to quantize, of `quantized` elements, of `all` that are in matrices; and the modules `left`
    because they cannot be quantized as asked."""

    tensors: frozenset[str]
    left: tuple[str, ...]
    quantized: int
    all: int


def quantised(
    source: Source,
    kind: str,
    options: Mapping[str, Any],
    *,
    dtype: str | None = None,
    experts: bool = False,
    measure: Measure | None = None,
) -> Derived:
    """Return the checkpoint that quantizing makes of `source`: as transformers would save it, in the same files.

    `options` are those of `BitsAndBytesConfig` or `FineGrainedFP8Config`. `dtype` (a torch name) is the model's, in
    which matrices are quantized and all else is stored; without it, matrices are cast to the model's own, and all else
    stays as it is, but for what transformers keeps in fp32. With `experts`, the experts of a mixture are quantized by
    bitsandbytes too, which is ours: transformers leaves them. If a number depends on a whole matrix, `measure` finds
    it; without, sizes may be a few bytes off.

    Raises:
        UsageError: an option is unknown or makes no sense.
        BadInputError: it is quantized already, has nothing to quantize, or modules whose weights are made of several
            tensors of it.
    """
    if quantization_of(source.config) is not None:
        raise BadInputError(
            f"{printable(source.root)}: is quantized already",
            hint="start from the unquantized checkpoint, or give --dequantize and quantize the result",
        )
    config = configuration_of(kind, options)
    recipe = _recipe(kind, config)
    if experts and kind == "fp8":
        raise UsageError("--quantize fp8 quantizes experts anyway", hint="leave out --experts")
    model_dtype = dtype or dtype_of(source)
    model = meta_model(source.root, dtype=model_dtype)
    naming, wanted = Naming(model, source.tensors), expected_dtypes(model, model_dtype)
    stored = {name: torch_name(info.dtype, tensor=name) for name, info in source.tensors.items()}
    targets = {name: naming.target(name) for name in source.tensors}
    method = str(getattr(config.quant_method, "value", config.quant_method))
    chosen = _chosen(model, config, method, recipe, targets, source, experts=experts)

    def wants(name: str) -> str:
        target = targets[name][0]
        return str(wanted[target]).removeprefix("torch.") if target else model_dtype

    matrices = {
        name: LocalTensor(name, info.shape, wants(name), (0, 0), whole(name, info.shape))
        for name, info in source.tensors.items()
        if name in chosen.tensors
    }
    numbers = _measured(recipe, matrices, measure)
    told = f"{kind} {sorted(config.to_dict().items(), key=str)}"
    files: dict[str, list[LocalTensor]] = {}
    computed: dict[str, Computed] = {}
    for file in source.files:
        entries = files.setdefault(file.name, [])
        for info in file.header.tensors:
            name = info.name
            if name not in matrices:
                # Without a dtype too, transformers saves in fp32 what it keeps in fp32.
                cast = stored[name] in FLOATING and (dtype is not None or wants(name) != model_dtype)
                entries.append(header_entry(name, info.shape, wants(name) if cast else stored[name]))
                continue
            matrix = matrices[name]
            for made in recipe.made(_size(matrix), matrix.dtype, numbers.get(name)):
                called = name.removesuffix(".weight") + made.suffix
                entries.append(header_entry(called, made.shape, made.dtype))
                text = f"{told} {numbers.get(name)} {made.suffix}"
                computed[called] = Computed(made.dtype, made.grid, (matrix,), partial(_make, made, _size(matrix)), text)
    written = _written(source.config, config, method, chosen, model, dtype)
    says = {"quantized": kind, "dequantized": None, "experts": experts, "dtype": dtype}
    notes = (*_notes(kind, chosen, experts=experts), *_unmatched(model, getattr(config, _SKIPPED[method])))
    return Derived(source, derived_files(source, files, written), computed, config_text(written), says, notes)


def _size(matrix: LocalTensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]


def _make(made: Made, size: tuple[int, int], read: ReadInput, top: int, bottom: int, left: int, right: int) -> Any:
    return made.box(_read_as(made.matrix, size, read), top, bottom, left, right)


def _read_as(shape: tuple[int, int], size: tuple[int, int], read: ReadInput) -> Read:
    """Return what reads a matrix of `size` as if it had `shape`: its own, or one row of all its elements."""
    if shape == size:
        return lambda top, bottom, left, right: read(0, (top, left), (bottom - top, right - left))
    width = size[1]

    def run(_: int, __: int, left: int, right: int) -> torch.Tensor:
        first, last = left // width, -(-right // width)
        rows = read(0, (first, 0), (last - first, width)).reshape(1, -1)
        return rows[:, left - first * width : right - first * width]

    return run


def _measured(recipe: Recipe, matrices: Mapping[str, LocalTensor], measure: Measure | None) -> dict[str, float]:
    """Return the number of each matrix, if the recipe needs one."""
    if recipe.measure is None:
        return {}
    if measure is None:
        return dict.fromkeys(matrices, _TYPICAL)
    find, wanted = recipe.measure, []
    for name, matrix in matrices.items():
        wanted.append((matrix, partial(_number, name, find, _size(matrix))))
    return dict(zip(matrices, measure(wanted), strict=True))


def _number(name: str, find: Callable[[Read, int], float], size: tuple[int, int], read: ReadInput) -> float:
    try:
        return find(_read_as((1, math.prod(size)), size, read), math.prod(size))
    except ValueError as error:
        raise BadInputError(f"{printable(name)}: {error}") from None


def needs_whole(kind: str, options: Mapping[str, Any]) -> bool:
    """Whether a number of each matrix must be found before anything is written. Raises UsageError as `quantised`."""
    return _recipe(kind, configuration_of(kind, options)).measure is not None


def _recipe(kind: str, config: Any) -> Recipe:
    try:
        return RECIPES[kind](config)
    except ValueError as error:
        raise UsageError(f"--quantize {kind}: {error}") from None


def _chosen(
    model: Any,
    config: Any,
    method: str,
    recipe: Recipe,
    targets: Mapping[str, tuple[str | None, str | None]],
    source: Source,
    *,
    experts: bool,
) -> _Chosen:
    """Choose the source tensors to quantize: those of the linear modules that transformers replaces."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    skip = getattr(config, _SKIPPED[method])
    skipped = HfQuantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
    modules = {}
    if experts and not any(name.endswith(".experts") for name, _ in model.named_modules()):
        raise UsageError("--experts is for mixtures of experts, and this model has none", hint="leave it out")
    for name, module in model.named_modules():
        if not should_convert_module(name, skipped):
            continue
        if isinstance(module, Conv1D):
            raise BadInputError(
                f"{printable(name)}: keeps its matrix transposed (Conv1D), and cannot be quantized while it is cut",
                hint="load it with the quantization in transformers, save that, and convert what was saved",
            )
        if type(module) is nn.Linear or ("GroupedLinear" in type(module).__name__ and method == "fp8"):
            modules[f"{name}.weight"] = name
        elif name.endswith(".experts") and (experts or method == "fp8"):
            modules |= {f"{name}.{own}": name for own, one in module.named_parameters(recurse=False) if one.ndim == 3}
    of_module: dict[str, list[str]] = defaultdict(list)
    for name, (target, conversion) in targets.items():
        if target not in modules:
            continue
        module_name = modules[target]
        if conversion is not None and not module_name.endswith(".experts"):
            raise BadInputError(
                f"{printable(module_name)}: its weight is made of other tensors of the checkpoint, so it cannot be"
                " quantized while it is cut",
                hint=f"leave it out: {_SKIPPED[method]} in --quantize-config",
            )
        of_module[module_name].append(name)
    tensors: set[str] = set()
    left = []
    for module_name, names in of_module.items():
        if all(_can_be(source.tensors[name], recipe) for name in names):
            tensors.update(names)
        else:
            left.append(module_name)
    if not tensors:
        raise BadInputError(
            f"{printable(source.root)}: has no matrix that can be quantized so",
            hint="give a block size that divides the sides of matrices: weight_block_size in --quantize-config"
            if left
            else None,
        )
    sizes = {name: math.prod(info.shape) for name, info in source.tensors.items() if len(info.shape) > 1}
    return _Chosen(frozenset(tensors), tuple(left), sum(sizes[name] for name in tensors), sum(sizes.values()))


def _can_be(info: TensorInfo, recipe: Recipe) -> bool:
    """Whether a source tensor is a matrix that the recipe is for."""
    return (
        len(info.shape) == 2
        and 0 not in info.shape
        and info.name.endswith(".weight")
        and torch_name(info.dtype, tensor=info.name) in FLOATING
        and recipe.fits((info.shape[0], info.shape[1]))
    )


def _written(
    config: Mapping[str, Any], quantization: Any, method: str, chosen: _Chosen, model: Any, dtype: str | None
) -> dict[str, Any]:
    """Return the content of config.json. Modules that could not be quantized are listed where those left out are."""
    from transformers.quantizers.base import HfQuantizer

    says, key = quantization.to_dict(), _SKIPPED[method]
    # bitsandbytes takes no experts anyway.
    left = [name for name in chosen.left if method == "fp8" or not name.endswith(".experts")]
    if left:
        says[key] = sorted({*HfQuantizer.get_modules_to_not_convert(model, says[key], None), *left})
    found = {**config, "quantization_config": says}
    if dtype is not None:
        found.pop("torch_dtype", None)
        found["dtype"] = dtype
    return found


def _unmatched(model: Any, skipped: Sequence[str] | None) -> list[str]:
    """Say which names of modules to leave out are those of none."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = [name for name, _ in model.named_modules()]
    wrong = [one for one in skipped or () if all(should_convert_module(name, [one]) for name in names)]
    return [f"modules to leave out that the model has not: {listed(wrong)}"] if wrong else []


def _notes(kind: str, chosen: _Chosen, *, experts: bool) -> tuple[str, ...]:
    found = []
    share = 1 - chosen.quantized / chosen.all
    if chosen.left:
        why = "a side is no whole blocks, or the experts are in one tensor"
        found.append(f"{kind}: {len(chosen.left)} modules are not quantized ({why}): {listed(chosen.left)}")
    if share >= _MUCH:
        found.append(f"{kind}: {share:.0%} of the weights in matrices are not quantized, as in transformers")
    if experts:
        found.append("the experts are quantized too, which transformers does not: it cannot load the result")
    return tuple(found)

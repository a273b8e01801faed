"""Units: the elements along the cut dims of quantized parameters that stay together, and what is cut with them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from ...transforms.bundle import Quantized
from .heads import BIAS_TOO, CUT_DIM, Heads

__all__ = ["heads_in_units", "units_of"]

_PACKED = {"packed_colwise": -2, "packed_rowwise": -1}
_LOCAL = {**CUT_DIM, **_PACKED}  # styles that leave each rank its own features: what meets them is cut alike
_DIMS = {
    **_LOCAL,
    **dict.fromkeys(("colwise_gather_output", "colwise_rep", "embedding_rowwise"), -2),
    **dict.fromkeys(("rowwise_split_input", "rowwise_rep", "embedding_colwise"), -1),
}


def units_of(
    bundles: Mapping[str, Quantized],
    styles: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    heads: Mapping[str, Heads],
) -> dict[str, int]:
    """Return the unit of each parameter that is cut together with a quantized one, in elements along its cut dim.

    Parameters are cut together if their features meet on a rank: those of one holder, such as an MLP or the experts of
    a layer. Its features are as many items as the sizes of the cut dims have in common; a parameter has some elements
    for each. A unit is whole items of all. Heads are dealt by themselves (`heads_in_units`).
    """
    if not bundles:
        return {}
    holders: dict[str, dict[str, int]] = defaultdict(dict)
    for name, style in styles.items():
        shape = shapes[name]
        if style in _DIMS and name not in heads and len(shape) > (style not in (*BIAS_TOO, "packed_colwise")):
            holders[_holder(name, style)][name] = _size(name, style, shape, bundles)
    found: dict[str, int] = {}
    for sizes in holders.values():
        items = math.gcd(*sizes.values())
        unit = math.lcm(*(_items(bundles[n], styles[n], size // items) for n, size in sizes.items() if n in bundles))
        found |= {name: unit * size // items for name, size in sizes.items() if unit > 1}
    return found


def heads_in_units(
    heads: Mapping[str, Heads],
    bundles: Mapping[str, Quantized],
    styles: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Heads]:
    """Return the heads with the number of KV heads that stay together in each attention."""
    query: dict[str, int] = defaultdict(lambda: 1)
    key_value: dict[str, int] = defaultdict(lambda: 1)
    for name, of in heads.items():
        if name in bundles:
            style, _, blocks = styles[name].partition("[")
            each = shapes[name][_LOCAL[style]] // of.count // (blocks.count(",") + 1)
            units = query if of.is_query else key_value
            units[of.attention] = math.lcm(units[of.attention], _items(bundles[name], style, each))
    found = {}
    for name, of in heads.items():
        wanted, group = query[of.attention], of.query // of.key_value
        together = math.lcm(key_value[of.attention], wanted // math.gcd(wanted, group))
        found[name] = replace(of, together=together) if together > 1 else of
    return found


def _holder(name: str, style: str) -> str:
    """Return the module whose parameters are cut together with this one."""
    module, _, own = name.rpartition(".")
    if style in _LOCAL and own in ("weight", "bias"):
        return module.rpartition(".")[0]
    return module


def _size(name: str, style: str, shape: tuple[int, ...], bundles: Mapping[str, Quantized]) -> int:
    """Return the size of what is cut along a dim: of one block, if several are packed there."""
    dim = _DIMS[style] if len(shape) > 1 else -1
    if style not in _PACKED:
        return shape[dim]
    blocks = bundles[name].blocks[dim] if name in bundles else ()
    return math.gcd(*blocks) if len(blocks) > 1 else shape[dim] // 2


def _items(quantized: Quantized, style: str, each: int) -> int:
    """Return how many items, of so many elements each, make whole entries of a quantized parameter."""
    unit = quantized.unit(len(quantized.blocks) + _DIMS[style])
    return unit // math.gcd(unit, each)

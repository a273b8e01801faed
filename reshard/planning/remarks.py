"""Remarks on a plan: tensors stored in another way than in the checkpoint, what is whole on every rank, and what the
result cannot be opened with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..checkpoint.source import Source
from ..files.dtypes import torch_name
from ..resharded.targets import Bundle, Target
from ..sharding.placement import Replicate, is_box
from ..sharding.regions import Region
from ..sharding.topology import Topology
from ..text import listed, printable
from ..transforms.bundle import divides_entries
from ..transforms.libraries import LIBRARY_OF

if TYPE_CHECKING:  # it comes with torch
    from .loads import Load
    from .model.model import Model

__all__ = [
    "LARGE_SHARE",
    "announced",
    "dtypes_of",
    "mixed_note",
    "partly_note",
    "quantized_note",
    "replicated_note",
    "runtime_only",
    "why_whole",
]

LARGE_SHARE = 0.2  # of a model's bytes on every rank, from which on a plan says what would help


def announced(source: object, ranks: object) -> str:
    """Return the line to say when planning begins. `source` is written as text."""
    return f"planning {printable(source)} for {ranks}"


def dtypes_of(regions: Iterable[Region], source: Source) -> set[str]:
    """Return the dtypes (torch names) of the source tensors that `regions` take from."""
    return {torch_name(source.tensors[region.source].dtype, tensor=region.source) for region in regions}


def mixed_note(targets: Iterable[Target], source: Source) -> list[str]:
    """Say in which dtypes parameters are stored that are made of tensors of several dtypes."""
    found = [(target, dtypes_of(target.regions, source)) for target in targets if len(target.regions) > 1]
    mixed = [(target, dtypes) for target, dtypes in found if len(dtypes) > 1]
    if not mixed:
        return []
    names = listed(target.name for target, _ in mixed)
    into = ", ".join(sorted({target.dtype for target, _ in mixed}))
    of = ", ".join(sorted(set().union(*(dtypes for _, dtypes in mixed))))
    return [f"{len(mixed)} parameters are made of tensors of several dtypes ({of}), stored in {into}: {names}"]


def partly_note(names: Sequence[str]) -> list[str]:
    """Say that source tensors of which the model takes a part are also kept whole."""
    if not names:
        return []
    return [f"{len(names)} tensors are used in part, and kept whole too, to be given back: {listed(names)}"]


def replicated_note(targets: Sequence[Target], model: Model, topology: Topology) -> list[str]:
    """Say what is whole on every rank, and what would help, if that is more than a fifth of the bytes."""
    sizes: Counter[str] = Counter()
    for target in targets:
        if isinstance(target.placement, Replicate):
            sizes[re.sub(r"\.\d+(?=\.|$)", ".*", target.name)] += target.nbytes
    whole, everything = sum(sizes.values()), sum(target.nbytes for target in targets)
    if topology.world_size == 1 or whole <= everything * LARGE_SHARE:
        return []
    names = ", ".join(f"{printable(name)} {size / everything:.0%}" for name, size in sizes.most_common(3))
    helps = []
    if model.experts > 1 and topology.ep == 1:
        helps.append(f"--ep-size {min(model.experts, topology.world_size)} spreads whole experts")
    if topology.tp == 1 < topology.world_size:
        helps.append(f"--tp-size {topology.world_size} cuts what is no expert")
    elif model.general_cuts:
        helps.append("--plan general cuts every layer by its output features")
    helps = helps or ["rules of yours may cut it, with --plan FILE"]
    return [f"{whole / everything:.0%} of the bytes are on every rank ({names}): {'; '.join(helps)}"]


def quantized_note(bundles: Sequence[Bundle], loads: Sequence[Load]) -> list[str]:
    """Say what computes with quantized weights, and what the fullest rank has of weights if they are dequantised."""
    if not bundles:
        return []
    forms = ", ".join(sorted({bundle.quantized.format for bundle in bundles}))
    most = max(load.weights for load in loads)
    libraries = sorted({LIBRARY_OF.get(bundle.quantized.format, "") for bundle in bundles} - {""})
    kept = f"{' and '.join(libraries)} computes with them, if it is installed; else " if libraries else ""
    notes = [
        f"{len(bundles)} parameters are quantized ({forms}) and stay so in the files; {kept}a rank dequantises its part"
        f" as it loads: {most:,} bytes of weights in {bundles[0].target.dtype} on the fullest"
    ]
    divided = [
        bundle.target.name
        for bundle in bundles
        if divides_entries(bundle.quantized, bundle.target.placement, len(loads))
    ]
    if divided:
        notes.append(
            f"{len(divided)} of them have fewer units than ranks, or share heads: words or scales at the bounds are on"
            f" both ranks: {listed(divided)}"
        )
    return notes


def why_whole(style: str | None, topology: Topology) -> str:
    """Say why a parameter of this style is whole on every rank."""
    if style is None:
        return "no rule in the tp_plan"
    return "tp is 1" if topology.tp == 1 < topology.world_size else f"{style} keeps it whole"


def runtime_only(
    targets: Iterable[Target], tied: Mapping[str, str], bundles: Sequence[Bundle], world_size: int
) -> list[str]:
    """List the reasons why transformers' own loader for rank files (torch's distributed checkpoint) cannot open the
    folder."""
    reasons = []
    scattered = [target.name for target in targets if not is_box(target.placement)]
    if scattered and world_size > 1:
        reasons.append(f"{len(scattered)} parameters are not one box per rank ({scattered[0]} …)")
    reasons += [f"{len(bundles)} parameters are quantized"] if bundles else []
    reasons += [f"{name} is tied to {owner} and stored once, but it looks for both" for name, owner in tied.items()]
    return reasons

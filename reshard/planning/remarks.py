"""Remarks on a plan: tensors stored in another way than in the checkpoint, what is whole on every rank, and what the
result cannot be opened with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..checkpoint.source import Source
from ..files.dtypes import torch_name
from ..resharded.targets import Target
from ..sharding.placement import is_box
from ..sharding.regions import Region
from ..sharding.topology import Topology
from ..text import listed, printable

__all__ = ["announced", "dtypes_of", "mixed_note", "partly_note", "runtime_only", "why_whole"]


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


def why_whole(style: str | None, topology: Topology) -> str:
    """Say why a parameter of this style is whole on every rank."""
    if style is None:
        return "no rule in the tp_plan"
    return "tp is 1" if topology.tp == 1 < topology.world_size else f"{style} keeps it whole"


def runtime_only(targets: Iterable[Target], tied: Mapping[str, str], world_size: int) -> list[str]:
    """List the reasons why transformers' own loader for rank files (torch's distributed checkpoint) cannot open the
    folder."""
    reasons = []
    scattered = [target.name for target in targets if not is_box(target.placement)]
    if scattered and world_size > 1:
        reasons.append(f"{len(scattered)} parameters are not one box per rank ({scattered[0]} …)")
    reasons += [f"{name} is tied to {owner} and stored once, but it looks for both" for name, owner in tied.items()]
    return reasons

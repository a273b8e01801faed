"""Remarks on a plan: tensors stored in another way than in the checkpoint, one line each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..checkpoint.source import Source
from ..files.dtypes import torch_name
from ..resharded.targets import Target
from ..sharding.regions import Region
from ..text import listed

__all__ = ["dtypes_of", "mixed_note", "partly_note"]


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

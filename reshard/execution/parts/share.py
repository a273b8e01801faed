"""The parts of a conversion that several machines make: which files each writes, and which bytes it reads for them.

The shares are fixed: they depend on the files and the number of parts alone. A part writes whole files, so two machines
never write one. Nothing here touches a file.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ...checkpoint.source import Source, SourceFile
from ...errors import UsageError
from ...files.dtypes import itemsize, torch_name
from ...resharded.derived import Computed, read_regions
from ...resharded.layout import FileLayout
from ...storage.remote import Span

__all__ = ["Part", "Share", "ranks_of", "share_of"]

_GAP = 1 << 20  # bytes: to ask for what is between two spans costs less than a request of its own
_ALL = 0.9  # of a file: the whole of it can be checked, for little more


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """One part of a conversion: its `number`, from 1, and how many parts it is `of`."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Return the part that a text such as 3/8 names. Raises ValueError."""
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"{text!r} is no part such as 3/8")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"part {self.number} of {self.of}"

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"part-{self.number:05d}-of-{self.of:05d}"


@dataclass(frozen=True, slots=True)
class Share:
    """What a part does: it writes the files of `layouts`, and digests whole the source files that are `digested`.

    `spans` are the bytes that it reads of each source file, in order.
    """

    part: Part
    layouts: tuple[FileLayout, ...]
    digested: frozenset[str]
    spans: Mapping[str, tuple[Span, ...]]

    @property
    def written(self) -> int:
        """Bytes of the files that it writes."""
        return sum(layout.size for layout in self.layouts)

    @property
    def read(self) -> int:
        """Bytes that it reads of the source files."""
        return sum(map(size_of, self.spans.values()))


def size_of(spans: Sequence[Span]) -> int:
    """Return the bytes of spans that do not overlap."""
    return sum(end - start for start, end in spans)


def ranks_of(part: Part, world_size: int) -> range:
    """Return the ranks whose files are a part's. Raises UsageError if there are more parts than ranks."""
    if part.of > world_size:
        raise UsageError(
            f"{part.of} parts of {world_size} rank files: a part is one rank file at least",
            hint=f"make {world_size} parts or fewer",
        )
    return range((part.number - 1) * world_size // part.of, part.number * world_size // part.of)


def share_of(
    part: Part,
    layouts: Sequence[FileLayout],
    world_size: int,
    source: Source,
    computed: Mapping[str, Computed] | None = None,
) -> Share:
    """Return a part's share of all the `layouts`: those of the ranks, then perhaps that of unused tensors, which goes
    to the part that writes least. `source` are the files that are read.

    Raises UsageError if there are more parts than ranks.
    """
    shares = [
        [layouts[rank] for rank in ranks_of(Part(number, part.of), world_size)] for number in range(1, part.of + 1)
    ]
    for apart in layouts[world_size:]:
        min(shares, key=lambda share: sum(layout.size for layout in share)).append(apart)
    own, digested = tuple(shares[part.number - 1]), _digested(part, source.files)
    return Share(part, own, digested, _spans(own, digested, source, computed or {}))


def _digested(part: Part, files: Sequence[SourceFile]) -> frozenset[str]:
    """Return the source files whose middle byte is in the part's share of all their bytes."""
    total = max(1, sum(file.size for file in files))
    ends = accumulate(file.size for file in files)
    middles = ((2 * end - file.size) * part.of // (2 * total) for file, end in zip(files, ends))
    return frozenset(file.name for file, at in zip(files, middles) if min(at, part.of - 1) == part.number - 1)


def _spans(
    layouts: Sequence[FileLayout], digested: frozenset[str], source: Source, computed: Mapping[str, Computed]
) -> dict[str, tuple[Span, ...]]:
    found: defaultdict[str, set[Span]] = defaultdict(set)
    for layout in layouts:
        for slot in layout.slots:
            for region in read_regions(slot.tensor.regions, computed):
                if math.prod(region.extent):
                    info = source.tensors[region.source]
                    width = itemsize(torch_name(info.dtype, tensor=info.name))
                    last = sum((size - 1) * stride for size, stride in zip(region.extent, region.strides))
                    start = info.start + region.offset * width
                    found[info.file].add((start, start + (last + 1) * width))
    sizes = {file.name: file.size for file in source.files}
    spans = {name: _merged(sorted(of)) for name, of in sorted(found.items())}
    whole = {*digested, *(name for name, of in spans.items() if size_of(of) > _ALL * sizes[name])}
    return {**spans, **{name: ((0, sizes[name]),) for name in sorted(whole)}}


def _merged(spans: Sequence[Span]) -> tuple[Span, ...]:
    merged: list[Span] = []
    for start, end in spans:
        if merged and start <= merged[-1][1] + _GAP:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)

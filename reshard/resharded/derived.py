"""A checkpoint that is not there: what another one becomes when it is quantized, or dequantised. Frozen data, no torch.

It is planned by its headers, as any. The executor computes its tensors box by box, from those that are there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..checkpoint.source import Source, SourceFile
from ..files.digest import new_digest
from ..files.header import parse_header
from ..sharding.regions import Region
from .layout import file_layout
from .targets import LocalTensor

__all__ = [
    "CONFIG_NAME",
    "Computed",
    "Derived",
    "ReadInput",
    "config_text",
    "derived_files",
    "header_entry",
    "read_regions",
]

CONFIG_NAME = "config.json"

ReadInput = Callable[[int, Sequence[int], Sequence[int]], Any]
"""Read a box of an input, by its number, start and extent: a tensor of torch."""


@dataclass(frozen=True, slots=True)
class Computed:
    """A tensor that no file holds. `make` computes a box of it: rows and entries of `grid`, which has its elements in
    order. It is given a function that reads boxes of the `inputs`. With these, `told` decides every byte.
    """

    dtype: str
    grid: tuple[int, int]
    inputs: tuple[LocalTensor, ...]
    make: Callable[[ReadInput, int, int, int, int], Any]
    told: str


@dataclass(frozen=True, slots=True)
class Derived:
    """A checkpoint made of another: `source` has the headers and the configuration that it would have.

    `computed` are its tensors that the `original` has not; the others are there, perhaps in another dtype. `config` is
    the content of its config.json. `told` is what the manifest says of it. `notes` are remarks for the user.
    """

    original: Source
    source: Source
    computed: Mapping[str, Computed]
    config: bytes
    told: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())

    def digest(self) -> str:
        """Return a digest of all that decides the bytes of its tensors, beside those that they are computed from."""
        digest = new_digest()
        digest.update(self.config)
        for name, made in self.computed.items():
            digest.update(f"{name} {made.told} {made.inputs}\n".encode())
        return digest.hexdigest()

    def filled(self, fill: Callable[[LocalTensor], LocalTensor]) -> Derived:
        """Return it with its inputs read from elsewhere."""
        computed = {name: replace(made, inputs=tuple(map(fill, made.inputs))) for name, made in self.computed.items()}
        return replace(self, computed=computed)


def read_regions(regions: Iterable[Region], computed: Mapping[str, Computed]) -> Iterator[Region]:
    """Yield the regions of tensors that are there, which must be read for `regions`."""
    for region in regions:
        made = computed.get(region.source)
        if made is None:
            yield region
        else:
            for one in made.inputs:
                yield from one.regions


def header_entry(name: str, shape: tuple[int, ...], dtype: str) -> LocalTensor:
    """Return a whole tensor of `derived_files`, which are headers: it says of no bytes where they come from."""
    return LocalTensor(name, shape, dtype, (0,) * len(shape), ())


def derived_files(original: Source, tensors: Mapping[str, Sequence[LocalTensor]], config: Mapping[str, Any]) -> Source:
    """Return a source whose files have the names of the `original`'s, and new headers for the `tensors` of each: those
    that `merge --layout hf` writes. A file without tensors is left out."""
    files = []
    for file in original.files:
        if tensors[file.name]:
            layout = file_layout(file.name, tensors[file.name])
            header = parse_header(layout.head[8:], file=file.name, file_size=layout.size)
            files.append(SourceFile(file.name, file.path, layout.size, file.mtime_ns, header))
    infos = {info.name: info for file in files for info in file.header.tensors}
    return replace(original, files=tuple(files), tensors=infos, config=dict(config))


def config_text(config: Mapping[str, Any]) -> bytes:
    """Return a config.json as transformers writes it."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()

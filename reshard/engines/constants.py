"""Values that no source tensor has, such as scales of 1.0 and rows of zeros: tensors of one element in a file of ours.

Regions repeat the element, as any tensor's with strides of 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..checkpoint.source import Source, SourceFile
from ..files.digest import digest_of, tree_digest
from ..files.dtypes import CODES
from ..files.header import parse_header, read_header
from ..resharded.rank_file import FileRecord

__all__ = ["CONSTANTS_NAME", "as_read", "constants_file", "constants_record"]

CONSTANTS_NAME = "reshard.constants"  # a safetensors file that no reader may take for weights


def constants_file(constants: Mapping[str, tuple[str, float | int | bool]]) -> bytes:
    """Return the file of constants, given by name as (dtype, value)."""
    import torch
    from safetensors.torch import save

    return save(
        {name: torch.tensor([value], dtype=getattr(torch, dtype)) for name, (dtype, value) in constants.items()}
    )


def constants_record(data: bytes) -> FileRecord:
    """Return the record of a file of constants, as of a rank file: with the digest of each tensor."""
    header = parse_header(data[8 : 8 + int.from_bytes(data[:8], "little")], file=CONSTANTS_NAME, file_size=len(data))
    found = {info.name: digest_of(data[info.start : info.end]) for info in header.tensors}
    return FileRecord(CONSTANTS_NAME, len(data), tree_digest(header.head, found.values()), found)


def as_read(source: Source, constants: Path, taken_for: Mapping[str, str]) -> Source:
    """Return the source as the rank files are filled from it: with the file of constants, and with the dtypes that some
    tensors are taken for."""
    status, header = constants.stat(), read_header(constants, file=CONSTANTS_NAME)
    file = SourceFile(CONSTANTS_NAME, constants, status.st_size, status.st_mtime_ns, header)
    tensors = {
        name: replace(info, dtype=CODES[taken_for[name]]) if name in taken_for else info
        for name, info in source.tensors.items()
    }
    more = {info.name: replace(info, file=CONSTANTS_NAME) for info in header.tensors}
    return replace(source, files=(*source.files, file), tensors={**tensors, **more})

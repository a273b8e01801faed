"""One rank file in memory: mapped, so that the ranks of a machine share its pages, and checked by digest."""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from reshard.digest import FileRecord, digest_of, tree_digest
from reshard.dtypes import torch_name
from reshard.errors import BadInputError, IntegrityError, printable
from reshard.header import TensorInfo, read_header

__all__ = ["map_rank_file"]


def map_rank_file(path: Path, record: FileRecord, *, check_digests: bool) -> dict[str, torch.Tensor]:
    """The tensors of a rank file, as views of its mapping: no bytes are copied.

    The mapping is private: writing to a tensor changes this process's copy of the page, never the file.

    Raises:
        IntegrityError: naming the file and the tensor whose bytes are not those that were written.
    """
    try:
        header = read_header(path, file=path.name)
    except BadInputError as error:
        raise IntegrityError(error.message) from None
    if {info.name for info in header.tensors} != record.tensors.keys():
        raise IntegrityError(f"{printable(path)}: does not hold the tensors that were written")
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if check_digests:
        _check(path, record, mapped, header.data_start, header.tensors)
    return {info.name: _tensor(mapped, info) for info in header.tensors}


def _check(path: Path, record: FileRecord, mapped: mmap.mmap, head: int, tensors: tuple[TensorInfo, ...]) -> None:
    view = memoryview(mapped)
    with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
        found = list(pool.map(lambda info: digest_of(view[info.start : info.end]), tensors))
    for info, digest in zip(tensors, found):
        if digest != record.tensors[info.name]:
            raise IntegrityError(
                f"{printable(path)}: tensor {printable(info.name)} was altered",
                hint="fetch or convert it again; reshard verify lists what else is wrong",
            )
    if tree_digest(mapped[:head], found) != record.digest:
        raise IntegrityError(f"{printable(path)}: its header was altered")


def _tensor(mapped: mmap.mmap, info: TensorInfo) -> torch.Tensor:
    dtype = getattr(torch, torch_name(info.dtype, tensor=info.name))
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=dtype)
    flat = torch.frombuffer(mapped, dtype=torch.uint8, count=info.nbytes, offset=info.start)
    return flat.view(dtype).view(info.shape)

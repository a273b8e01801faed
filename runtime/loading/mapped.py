"""A reader of one rank file on CPU: it maps the file, so that processes of a machine share pages, and checks it."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

import torch

from reshard.errors import IntegrityError
from reshard.files.digest import digest_of
from reshard.files.dtypes import torch_name
from reshard.files.header import TensorInfo
from reshard.files.system import by_errno
from reshard.resharded.rank_file import FileRecord, check_digests, largest_first, read_rank_header
from reshard.text import printable

__all__ = ["map_rank_file"]


def map_rank_file(
    path: Path, record: FileRecord, pool: Executor, *, digests: bool
) -> Callable[[], dict[str, torch.Tensor]]:
    """Map a rank file and, with `digests`, begin to digest it on the pool.

    The returned function returns the tensors, views of the mapping: no bytes are copied. The mapping is private:
    writing to a tensor changes this process's copy of the page, never the file.

    Raises:
        IntegrityError: the bytes of a tensor are not those written: at once or at the call, naming file and tensor.
        StorageError: the system does not let the file be read: at once.
    """
    header = read_rank_header(path, record)
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise by_errno(error, f"{printable(path)}: cannot be read: {error.strerror}", IntegrityError) from None
    view = memoryview(mapped)
    running = {
        info.name: pool.submit(digest_of, view[info.start : info.end])
        for info in (largest_first(header) if digests else ())
    }

    def finish() -> dict[str, torch.Tensor]:
        if digests:
            check_digests(path, record, header, {name: digest.result() for name, digest in running.items()})
        return {info.name: _tensor(mapped, info) for info in header.tensors}

    return finish


def _tensor(mapped: mmap.mmap, info: TensorInfo) -> torch.Tensor:
    dtype = getattr(torch, torch_name(info.dtype, tensor=info.name))
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=dtype)
    flat = torch.frombuffer(mapped, dtype=torch.uint8, count=info.nbytes, offset=info.start)
    return flat.view(dtype).view(info.shape)

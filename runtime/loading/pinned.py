"""A reader of one rank file onto a device: threads read pieces into pinned memory while earlier ones are copied."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch

from reshard.errors import IntegrityError, TopologyError
from reshard.files.digest import new_digest
from reshard.files.dtypes import torch_name
from reshard.files.header import Header, TensorInfo
from reshard.files.system import by_errno
from reshard.resharded.rank_file import FileRecord, check_digests, largest_first, read_rank_header
from reshard.text import printable

__all__ = ["ALIGNMENT", "BUFFER_BYTES", "offsets", "read_rank_file"]

ALIGNMENT = 256  # bytes: kernels with wide loads need tensors at such addresses, as separate allocations are
BUFFER_BYTES = 8 << 20


def offsets(tensors: Iterable[TensorInfo]) -> tuple[dict[str, int], int]:
    """Return each tensor's offset in one allocation, and the size of the allocation, in bytes."""
    found, at = {}, 0
    for info in tensors:
        found[info.name] = at
        at += -(-info.nbytes // ALIGNMENT) * ALIGNMENT
    return found, at


class _Lane:
    """A thread's two buffers and its own stream: one buffer is filled while the other is copied into `space`."""

    def __init__(self, space: torch.Tensor) -> None:
        device = space.device
        self._stream: Any = None
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a new thread would open a context on the first GPU
            self._stream = torch.cuda.Stream(device)
            # The memory of `space` may still be in use on the stream that allocated it, so wait for that stream. After
            # a failure `space` may be freed during a copy: the allocator then reuses it only after this stream.
            self._stream.wait_stream(torch.cuda.current_stream(device))
            space.record_stream(self._stream)
        pinned = self._stream is not None
        self._buffers = [torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._copies: list[Any] = [None, None]
        self._turns = itertools.cycle(range(2))

    def through(self, fd: int, info: TensorInfo, target: torch.Tensor, digest: Any) -> None:
        """Copy a tensor's bytes from the file into `target`, in order, and add them to the digest."""
        for start in range(0, info.nbytes, BUFFER_BYTES):
            turn = next(self._turns)
            self._wait(turn)
            piece = self._buffers[turn][: min(BUFFER_BYTES, info.nbytes - start)]
            data = memoryview(piece.numpy())
            _read(fd, data, info.start + start)
            if digest is not None:
                digest.update(data)
            self._copies[turn] = self._send(target[start : start + len(data)], piece)

    def _send(self, target: torch.Tensor, piece: torch.Tensor) -> Any:
        """Begin a copy. Return the event that ends it, or None if it is done already."""
        if self._stream is None:
            target.copy_(piece)
            return None
        with torch.cuda.stream(self._stream):
            target.copy_(piece, non_blocking=True)
            return self._stream.record_event()

    def _wait(self, turn: int) -> None:
        if self._copies[turn] is not None:
            self._copies[turn].synchronize()
            self._copies[turn] = None

    def finish(self) -> None:
        """Wait for the copies under way."""
        self._wait(0)
        self._wait(1)


def _read(fd: int, data: memoryview, offset: int) -> None:
    while data:
        size = os.preadv(fd, [data], offset)
        if not size:
            raise EOFError
        data, offset = data[size:], offset + size


def read_rank_file(
    path: Path, record: FileRecord, device: torch.device, pool: Executor, *, digests: bool
) -> Callable[[], dict[str, torch.Tensor]]:
    """Begin to read a rank file into one allocation on `device`, on the pool's threads.

    The returned function waits until everything has arrived, and returns the tensors, views of that allocation. Host
    memory is two pinned buffers of BUFFER_BYTES for each thread. With `digests`, each piece is digested as it is read.

    Raises:
        IntegrityError: the bytes of a tensor are not those written: at once or at the call, naming file and tensor.
        TopologyError: the device has no room for the file.
    """
    header = read_rank_header(path, record)
    begins, total = offsets(header.tensors)
    try:
        space = torch.empty(total, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        free = torch.cuda.mem_get_info(device)[0]
        raise TopologyError(
            f"{printable(path)}: needs {total:,} bytes on {device}, where {free:,} are free",
            hint="convert for more ranks, or end what else uses the GPU",
        ) from None
    lanes: dict[int, _Lane] = {}
    file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed when the last thread drops it

    def bring(info: TensorInfo) -> str:
        lane = lanes.get(threading.get_ident()) or lanes.setdefault(threading.get_ident(), _Lane(space))
        digest = new_digest() if digests else None
        lane.through(file.fileno(), info, _part(space, begins, info), digest)
        return digest.hexdigest() if digest is not None else ""

    running = {info.name: pool.submit(bring, info) for info in largest_first(header)}

    def finish() -> dict[str, torch.Tensor]:
        try:
            found = {name: arrived.result() for name, arrived in running.items()}
            for lane in lanes.values():
                lane.finish()
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or "was cut short"
            words = f"{printable(path)}: {reason}, while it was being read"
            raise by_errno(error, words, IntegrityError) from None
        if digests:
            check_digests(path, record, header, found)
        return _tensors(space, begins, header)

    return finish


def _part(space: torch.Tensor, begins: dict[str, int], info: TensorInfo) -> torch.Tensor:
    return space[begins[info.name] : begins[info.name] + info.nbytes]


def _tensors(space: torch.Tensor, begins: dict[str, int], header: Header) -> dict[str, torch.Tensor]:
    found = {}
    for info in header.tensors:
        dtype = getattr(torch, torch_name(info.dtype, tensor=info.name))
        found[info.name] = _part(space, begins, info).view(dtype).view(info.shape)
    return found

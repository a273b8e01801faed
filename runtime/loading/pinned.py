"""One rank file onto a device: threads read it piece by piece into pinned memory, while earlier pieces travel on."""

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

ALIGNMENT = 256  # bytes: what kernels for wide loads ask of a tensor's address, as of an allocation of its own
BUFFER_BYTES = 8 << 20


def offsets(tensors: Iterable[TensorInfo]) -> tuple[dict[str, int], int]:
    """Where each tensor begins in one allocation, and the bytes of all."""
    found, at = {}, 0
    for info in tensors:
        found[info.name] = at
        at += -(-info.nbytes // ALIGNMENT) * ALIGNMENT
    return found, at


class _Lane:
    """A thread's two buffers: one is filled while the other's copy into `space` is under way, on a stream of the
    lane's own."""

    def __init__(self, space: torch.Tensor) -> None:
        device = space.device
        self._stream: Any = None
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a new thread is on the first GPU, and would open a context there
            self._stream = torch.cuda.Stream(device)
            # What is written to may have been in use on the stream it was allocated on; and its memory may be let go
            # of, after a failure, while a copy is under way: it is used again only behind that.
            self._stream.wait_stream(torch.cuda.current_stream(device))
            space.record_stream(self._stream)
        pinned = self._stream is not None
        self._buffers = [torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._copies: list[Any] = [None, None]
        self._turns = itertools.cycle(range(2))

    def through(self, fd: int, info: TensorInfo, target: torch.Tensor, digest: Any) -> None:
        """Bring a tensor's bytes from the file into `target`, in order, and into the digest."""
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
        """Begin a copy; the event that comes when it is over, or None where it is over at once."""
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

    Call what is returned for the tensors, views of that allocation; it waits until everything has arrived. Host memory
    is two pinned buffers of BUFFER_BYTES for each thread. With `digests`, each piece is digested as it passes.

    Raises:
        IntegrityError: at once or at the call, naming the file and the tensor whose bytes are not those written.
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
    file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with the last thread that reads it

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

"""Timings of the parts of a load."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

__all__ = ["Phases", "load_report"]

_OWN = ("open", "import", "build", "read")  # the parts that a rank does alone, while its file is read


class Phases:
    """Seconds of each part of a load, in order. A part begins when the one before it ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = now - self._since
        self._since = now


def load_report(model: Any) -> str:
    """Report the load times of rank 0 and of the rank whose own parts took longest. A collective: call it on all.

    A rank's rate is that of reading its file, from when it was found until it was read; the model is built meanwhile.
    Further lines say what computes with quantized weights, and what these take in memory.
    """
    mine = (model.reshard_seconds, model.reshard_bytes)
    ranks: list[Any] = [mine] * model._device_mesh.size()
    if len(ranks) > 1:
        dist.all_gather_object(ranks, mine, group=model._device_mesh.get_group())
    slowest = max(range(len(ranks)), key=lambda rank: _own(ranks[rank][0]))
    lines = [_line(rank, *ranks[rank]) for rank in sorted({0, slowest})]
    return "\n".join([*lines, *model._reshard_quantized.report(model)])


def _own(seconds: dict[str, float]) -> float:
    return sum(seconds[part] for part in _OWN)


def _line(rank: int, seconds: dict[str, float], size: int) -> str:
    reading = _own(seconds) - seconds["open"]
    parts = ", ".join(f"{part} {value:.3f}" for part, value in seconds.items())
    rate = f"{size / 1e9:.3f} GB at {size / 1e9 / reading:.2f} GB/s"
    return f"rank {rank}: loaded {rate} in {sum(seconds.values()):.3f} s: {parts}"

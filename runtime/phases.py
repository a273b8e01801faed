"""How long each part of a load took."""

from __future__ import annotations

import time

__all__ = ["Phases"]


class Phases:
    """Seconds of the parts of a work, in order. A part begins where the one before it ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = now - self._since
        self._since = now

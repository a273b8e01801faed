"""What a benchmark asks of a rank, and what that gives back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Measured", "Point", "Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured: batch sizes, tokens of a prompt, tokens decoded behind it, and whether compiled as well.

    A model of fewer positions gets a prompt that fits.
    """

    batches: tuple[int, ...] = (1, 2, 4)
    length: int = 512
    steps: int = 8
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """Medians at one batch size, in seconds: a forward of the prompts that gives the logits of their last tokens, and a
    step of one token behind them (None where the model decodes nothing)."""

    batch: int
    compiled: bool
    prefill: float
    decode: float | None


@dataclass(frozen=True, slots=True)
class Measured:
    """What one job of `ranks` processes took. Seconds of the load, part by part where they are known, and from the
    start of the process to its first token; bytes of the rank that has most: on a GPU the peak of what was allocated,
    on CPU what is the process's own after the runs, without pages of mapped files. `folder` tells apart those for as
    many ranks."""

    engine: str
    ranks: int
    model: str
    dtype: str
    device: str
    threads: int
    length: int
    load: float
    parts: dict[str, float]
    first_token: float | None
    memory: int
    points: tuple[Point, ...]
    folder: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Measured:
        return cls(**{**content, "points": tuple(Point(**point) for point in content["points"])})

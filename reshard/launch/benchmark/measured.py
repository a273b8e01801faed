"""The settings of a benchmark, and the figures that a rank returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Measured", "Point", "Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a benchmark: batch sizes, tokens of a prompt, tokens decoded after it, and whether to compile too.

    A model with fewer positions gets a prompt that fits.
    """

    batches: tuple[int, ...] = (1, 2, 4)
    length: int = 512
    steps: int = 8
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """Medians at one batch size, in seconds.

    `prefill` is a forward of the prompts that gives the logits of their last tokens. `decode` is a step of one token
    after them, None if the model decodes nothing.
    """

    batch: int
    compiled: bool
    prefill: float
    decode: float | None


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures of one job of `ranks` processes.

    `load` and its `parts`, if they are known, are in seconds, as is `first_token`, from the start of the process.
    `memory` is in bytes, of the rank that has most: on a GPU the peak of what was allocated, on CPU the process's own
    memory after the runs, without pages of mapped files. `folder` tells apart folders with as many ranks, and `compute`
    what computes with quantized weights, if that was compared.
    """

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
    compute: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Measured:
        return cls(**{**content, "points": tuple(Point(**point) for point in content["points"])})

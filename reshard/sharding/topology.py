"""The number of ranks, and how tensor and expert parallelism share them. Integers only."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import TopologyError

__all__ = ["Topology"]


@dataclass(frozen=True, slots=True)
class Topology:
    """Sizes of the mesh's axes. Both axes span the same ranks, so the larger size is the number of ranks.

    Ranks in a row belong together: with `tp` 4 and `ep` 2, ranks 0 and 1 hold the same experts, each cut in two. With
    `tp` 2 and `ep` 4, ranks 0 and 1 hold the same part of everything but the experts.
    """

    tp: int
    ep: int = 1

    def __post_init__(self) -> None:
        if self.tp < 1 or self.ep < 1:
            raise TopologyError("there must be at least one rank")
        if max(self.tp, self.ep) % min(self.tp, self.ep):
            raise TopologyError(
                f"tp {self.tp} and ep {self.ep} do not share ranks", hint="one of the two must divide the other"
            )

    @property
    def world_size(self) -> int:
        return max(self.tp, self.ep)

    @property
    def tp_row(self) -> int:
        """The number of ranks in a row that hold the same part of a tensor cut by tensor parallelism."""
        return self.world_size // self.tp

    @property
    def ep_row(self) -> int:
        """The number of ranks in a row that hold the same experts."""
        return self.world_size // self.ep

    def to_json(self) -> dict[str, int]:
        return {"tp": self.tp, "ep": self.ep} if self.ep > 1 else {"tp": self.tp}

    def __str__(self) -> str:
        return f"{self.world_size} ranks" + (f" (tp {self.tp}, ep {self.ep})" if self.ep > 1 else "")

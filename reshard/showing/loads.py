"""What each rank holds, by kind of parameter: for the bars of the terminal and of the page. From a report's dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["KINDS", "RankLoad", "is_replicated", "rank_loads"]

# In the order of the bars, each with its name for people. A parameter that every rank holds whole is of the last kind,
# whatever it is part of.
KINDS = {
    "attention": "attention",
    "mlp": "MLP",
    "experts": "experts",
    "embedding": "embedding and head",
    "other": "other",
    "replicated": "replicated",
}


@dataclass(frozen=True, slots=True)
class RankLoad:
    """A rank's bytes: of its tensors by kind (every one of `KINDS`), of its file, and of its KV cache.

    `cache` is None if the report does not tell: that of a manifest does not.
    """

    rank: int
    kinds: Mapping[str, int]
    file: int
    cache: int | None

    @property
    def weights(self) -> int:
        return sum(self.kinds.values())


def is_replicated(row: Mapping[str, Any]) -> bool:
    """Whether each of several ranks holds a row's parameters whole."""
    return len(row["rank_bytes"]) > 1 and not row.get("cuts", True)


def rank_loads(report: Mapping[str, Any]) -> list[RankLoad]:
    """Return the load of every rank, from the dict of a plan or of a manifest."""
    sizes = report["rank_bytes"] if "rank_bytes" in report else [rank["size"] for rank in report["ranks"]]
    found = []
    for rank, size in enumerate(sizes):
        kinds = dict.fromkeys(KINDS, 0)
        for row in report["parameters"]:
            kinds["replicated" if is_replicated(row) else row["kind"]] += row["rank_bytes"][rank]
        found.append(RankLoad(rank, kinds, size, report["ranks"][rank].get("kv_bytes")))
    return found

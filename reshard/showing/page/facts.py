"""What a report says at a glance, in words and numbers: what is uneven, what is replicated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...text import numbers_in_runs
from ..loads import RankLoad, is_replicated
from ..tables import gigabytes
from .groups import short_name

__all__ = ["advice", "even_share", "findings", "glance", "held", "legal_sizes", "ratio", "share"]

_EVEN = 1.02  # a rank with no more than this many even shares is as full as the others, for a reader


def glance(report: Mapping[str, Any], loads: Sequence[RankLoad]) -> list[tuple[str, str]]:
    """Return the first numbers to see, each with what it is."""
    fullest = max(loads, key=lambda load: load.file)
    replicated = fullest.kinds["replicated"]
    found = [
        (f"{len(loads)}", "rank files, " + ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())),
        (gigabytes(fullest.file), "the largest rank file"),
        (gigabytes(sum(load.file for load in loads)), "all rank files"),
        (f"{share(fullest, report):.2f} ×", "the fullest rank, in even shares of the model"),
    ]
    if len(loads) > 1:
        found.append((percent(replicated / (fullest.weights or 1)), "of each file is replicated"))
    cache = max((load.cache or 0 for load in loads), default=0)
    if cache:
        serving = report["serving"]
        found.append(
            (gigabytes(cache), f"of KV cache for {serving['batch_size']} × {serving['max_model_len']:,} tokens")
        )
    return found


def even_share(report: Mapping[str, Any]) -> float:
    """Return the bytes of a rank if every stored byte were on one rank, and every rank had as many."""
    return sum(row["count"] * row["bytes"] for row in report["parameters"]) / len(report["ranks"])


def share(load: RankLoad, report: Mapping[str, Any]) -> float:
    """Return a rank's weights in even shares."""
    return load.weights / (even_share(report) or 1)


def findings(report: Mapping[str, Any], loads: Sequence[RankLoad]) -> list[tuple[str, str]]:
    """Say in sentences what is uneven and what is replicated; each with "good" or "look"."""
    if len(loads) < 2:
        return [("good", "One rank holds everything.")]
    return [*_uneven(report, loads), *_replicated(report, loads), *_repeated(report)]


def _uneven(report: Mapping[str, Any], loads: Sequence[RankLoad]) -> list[tuple[str, str]]:
    weights = [load.weights for load in loads]
    mean = sum(weights) / len(weights) or 1
    if max(weights) <= _EVEN * mean:
        least, most = gigabytes(min(weights)), gigabytes(max(weights))
        return [
            ("good", f"Even: every rank holds {most}." if least == most else f"Even: a rank holds {least} to {most}.")
        ]
    full, slack = weights.index(max(weights)), weights.index(min(weights))
    words = f"Uneven: rank {full} holds {gigabytes(weights[full])} and rank {slack} holds {gigabytes(weights[slack])}"
    names = [_name(row) for row in _by_difference(report)[:3]]
    return [("look", f"{words}, because of {', '.join(names)}." if names else f"{words}.")]


def _by_difference(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows that differ between ranks, those with the largest differences first."""
    rows = [row for row in report["parameters"] if max(row["rank_bytes"]) > min(row["rank_bytes"])]
    return sorted(rows, key=lambda row: min(row["rank_bytes"]) - max(row["rank_bytes"]))


def _replicated(report: Mapping[str, Any], loads: Sequence[RankLoad]) -> list[tuple[str, str]]:
    whole = sorted(filter(is_replicated, report["parameters"]), key=lambda row: -row["rank_bytes"][0])
    size = sum(row["rank_bytes"][0] for row in whole)
    if not whole:
        return [("good", "Nothing is replicated.")]
    part = size / (max(load.weights for load in loads) or 1)
    words = f"Replicated: {gigabytes(size)} in each file, {percent(part)} of the fullest"
    names = ", ".join(f"{_name(row)} {gigabytes(row['rank_bytes'][0])}" for row in whole[:3])
    return [("look" if part > 0.05 else "good", f"{words}. The most: {names}.")]


def _repeated(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say what is held more than once, but not whole on every rank."""
    rows = [row for row in report["parameters"] if not is_replicated(row) and held(row) > 1.001]
    if not rows:
        return []
    rows.sort(key=lambda row: row["count"] * row["bytes"] - sum(row["rank_bytes"]))
    names = ", ".join(f"{_name(row)} ({ratio(held(row))})" for row in rows[:3])
    return [("look", f"Held more than once: {names}.")]


def held(row: Mapping[str, Any]) -> float:
    """Return how often a row's bytes are held: 1 if each is on one rank, the number of ranks if all are replicated."""
    return sum(row["rank_bytes"]) / (row["count"] * row["bytes"] or 1)


def ratio(times: float) -> str:
    """Write how often something is held."""
    return f"{times:.3g} ×"


def percent(part: float) -> str:
    """Write a part of a whole."""
    return "< 0.1%" if 0 < part < 0.001 else f"{part:.1%}"


def _name(row: Mapping[str, Any]) -> str:
    return short_name(row["parameter"]).removesuffix(".weight")


def advice(report: Mapping[str, Any]) -> list[str]:
    """Say which legal numbers of ranks give every rank as many heads: those that divide every number of heads, or that
    a number of KV heads divides, which are then repeated."""
    counts = {row["heads"] for row in report["parameters"] if "heads" in row}
    even = [
        size
        for size, why in legal_sizes(report)
        if why is None and counts and all(count % size == 0 or size % count == 0 for count in counts)
    ]
    cut = numbers_in_runs(size for size in even if size <= min(counts))
    repeated = numbers_in_runs(size for size in even if size > min(counts))
    lines = [f"heads divide evenly over {cut} ranks"] if cut else []
    return lines + (
        [f"query heads divide evenly over {repeated} ranks, with each KV head on several"] if repeated else []
    )


def legal_sizes(report: Mapping[str, Any]) -> list[tuple[int, str | None]]:
    """Return every number of ranks that was looked at, with the reason why not. A manifest tells none."""
    return [(int(size), why) for size, why in report.get("tp_sizes", {}).items()]

"""Reports of plans and manifests in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from ..sharding.topology import Topology
from ..text import numbers_in_runs, printable
from .bars import bars_text
from .engines import options_of
from .tables import gigabytes, table

__all__ = ["manifest_text", "part_text", "plan_text", "remarks", "size_table_text", "sizes_text"]


_NOTE = 1000  # the most characters shown of a remark


def _parameter_table(found: Sequence[Mapping[str, Any]], dtype: str, width: int | None) -> str:
    """Write the table of parameters. A row shows its dtype only if it is not `dtype`, or how it is quantized."""
    lines: list[Sequence[Any]] = [
        ("parameter", "×", "shape", "dtype", "style, or why replicated", "placement", "on rank 0")
    ]
    for row in found:
        lines.append(
            (
                row["parameter"],
                str(row["count"]),
                "×".join(map(str, row["shape"])) or "scalar",
                _stored(row, dtype),
                row["reason"] or row["style"],
                row["placement"],
                "×".join(map(str, row["rank_0_shape"])) or "scalar",
            )
        )
    return table(lines, width=width, shorten=((4, 12), (5, 12), (0, 21)))


def _stored(row: Mapping[str, Any], dtype: str) -> str:
    how = row.get("quantized")
    if how is None:
        return "" if row["dtype"] == dtype else row["dtype"]
    return f"{how['format']}, {8 * how['bytes'] / (prod(row['shape']) or 1):.3g} bits"


def sizes_text(sizes: Mapping[int, str | None]) -> list[str]:
    """List the legal numbers of ranks, and why others are not: each reason once, three at most."""
    legal = numbers_in_runs(size for size, why in sizes.items() if why is None)
    lines = [f"legal tp sizes: {legal}"]
    firsts = {why: size for size, why in sorted(sizes.items(), reverse=True) if why is not None}
    return lines + [f"  not {size}: {why}" for why, size in sorted(firsts.items(), key=lambda one: one[1])[:3]]


def plan_text(report: Mapping[str, Any], width: int | None = None, *, blocks: bool = True) -> str:
    """Write the plan's report in words; its table and its bars in at most `width` characters. Bars have block
    characters, or signs of ASCII if not `blocks`."""
    lines = [
        f"{report['architecture']} ({report['dtype']}) for {Topology(**report['mesh'])}",
        "",
        _parameter_table(report["parameters"], report["dtype"], width),
        "",
        *_bars(report, width, blocks),
    ]
    ranks = report["rank_bytes"]
    lines.append(f"rank files: {gigabytes(max(ranks))} each at most, {gigabytes(sum(ranks))} in all")
    lines.append(f"replicated in every file: {gigabytes(report['replicated_bytes'])}")
    lines += _loads(report)
    lines.append(
        f"disk needed: {gigabytes(report['disk_bytes'])}, memory: {gigabytes(report['memory_bytes'])} of blocks"
    )
    lines += remarks(report)
    if report["ep_sizes"]:
        lines.append(f"legal ep sizes: {numbers_in_runs(report['ep_sizes'])}")
    lines += sizes_text({int(size): why for size, why in report["tp_sizes"].items()})
    return "\n".join(lines)


def _bars(report: Mapping[str, Any], width: int | None, blocks: bool) -> list[str]:
    lines = bars_text(report, width, blocks=blocks)
    return [*lines, ""] if lines else []


def _loads(report: Mapping[str, Any]) -> list[str]:
    """Say what each rank has: its heads, the largest part of the weights, and the KV cache."""
    ranks, serving, lines = report["ranks"], report["serving"], []
    held = Counter(_heads(rank["heads"]) for rank in ranks if rank["heads"])
    if held:
        lines.append("heads: " + ", ".join(f"{heads} on {_ranks(count)}" for heads, count in held.items()))
    if len(ranks) > 1:
        lines.append(f"the fullest rank has {report['even_shares']:.2f} × an even share, which bounds the speed")
    fullest = max(ranks, key=lambda rank: rank["kv_bytes_per_token"] or 0)
    if fullest["kv_bytes_per_token"]:
        tokens = serving["max_model_len"]
        served = f"; {gigabytes(fullest['kv_bytes'])} for {serving['batch_size']} × {tokens:,} tokens" if tokens else ""
        lines.append(f"KV cache: {fullest['kv_bytes_per_token']:,} bytes a token on the fullest rank{served}")
    return lines


def _heads(heads: Sequence[Mapping[str, int]]) -> str:
    return " and ".join(f"{one['query']} with {one['key_value']} KV" for one in heads)


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def size_table_text(sizes: Sequence[Mapping[str, Any]], width: int | None = None) -> str:
    """Write the legal numbers of ranks as a table, each with what its fullest rank holds."""
    lines: list[Sequence[Any]] = [
        ("ranks", "weights", "even shares", "replicated", "KV bytes a token", "KV cache", "heads")
    ]
    for size in sizes:
        lines.append(
            (
                str(Topology(**size["mesh"])).removesuffix(" ranks"),
                gigabytes(size["weight_bytes"]),
                f"{size['even_shares']:.2f}",
                f"{size['replicated_share']:.1%}",
                size["kv_bytes_per_token"] and f"{size['kv_bytes_per_token']:,}",
                size["kv_bytes"] and gigabytes(size["kv_bytes"]),
                _heads(size["heads"]),
            )
        )
    return table(lines, width=width, shorten=((6, 12),))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(printable, names))


def remarks(report: Mapping[str, Any]) -> list[str]:
    """List what else a report says, one line each: ties, what is not used, rules, and remarks of the plan."""
    lines = [f"tied: {printable(name)} → {printable(owner)}" for name, owner in report["tied"].items()]
    for key, words in (("unused", "not used by the model, kept apart"), ("dropped", "not used by the model, dropped")):
        if report[key]:
            some = ", ".join(printable(name) for name in report[key][:3])
            lines.append(f"{words}: {len(report[key])} tensors ({some}{' …' if len(report[key]) > 3 else ''})")
    if report.get("unused_rules"):
        lines.append("rules that match nothing here: " + _listed(report["unused_rules"]))
    if report.get("corrected_rules"):
        lines.append("rules of the model that cannot be right, put right: " + _listed(report["corrected_rules"]))
    for name, strategy in report["custom_strategies"].items():
        lines.append(f"custom strategy: {printable(name)} ({printable(strategy)})")
    reasons = [printable(reason) for reason in report["runtime_only"]]
    lines.append("opens in plain transformers: " + (f"no, {'; '.join(reasons)}" if reasons else "yes"))
    return lines + [printable(note, _NOTE) for note in report.get("notes", ())]


def _engine_line(engine: Mapping[str, Any] | None) -> list[str]:
    """Say which engine rank files are for, and how it must be started."""
    if engine is None:
        return []
    where = " ".join(
        [engine["platform"], *([".".join(map(str, engine["capability"]))] if engine["capability"] else [])]
    )
    return [printable(f"for {engine['name']} {engine['version']} on {where}: {' '.join(options_of(engine))}")]


def _derived_line(derived: Mapping[str, Any] | None) -> list[str]:
    if derived is None:
        return []
    what = f"dequantised from {derived['dequantized']}"
    if derived["quantized"]:
        what = f"quantized to {derived['quantized']}{', with experts' if derived['experts'] else ''}"
    return [printable(f"its weights were {what} when it was made")]


def part_text(report: Mapping[str, Any]) -> str:
    """Write what a part of a conversion did, or is to do, in one line."""
    files = f"{len(report['files'])} file{'s' if len(report['files']) > 1 else ''}"
    which = f"part {report['part']} of {report['of']}: {files}"
    if report["done_before"]:
        return f"{which}, done before"
    counts = (("written", "bytes_written"), ("read", "bytes_read"), ("fetched", "bytes_fetched"))
    return ", ".join([which, *(f"{report[key]:,} bytes {what}" for what, key in counts if report[key] is not None)])


def manifest_text(report: Mapping[str, Any], width: int | None = None, *, blocks: bool = True) -> str:
    """Write the manifest's report in words; its tables and its bars in at most `width` characters. Bars are as in
    `plan_text`."""
    origin = report["source"]["repo_id"]
    source = f" from {origin}@{report['source']['commit']}" if origin else ""
    tool = ", ".join(f"{name} {version}" for name, version in report["tool"].items())
    lines = [
        printable(f"{report['architecture']} ({report['dtype']}) for {Topology(**report['mesh'])}{source}"),
        printable(f"made by {tool}"),
        *_engine_line(report.get("engine")),
        *_derived_line(report.get("derived")),
        "",
        _parameter_table(report["parameters"], report["dtype"], width),
        "",
        *_bars(report, width, blocks),
        table(
            [("rank file", "size", "digest")]
            + [(r["file"], gigabytes(r["size"]), r["digest"]) for r in report["ranks"]],
            width=width,
            shorten=((2, 16), (0, 16)),
        ),
        "",
        f"replicated in every file: {gigabytes(report['replicated_bytes'])}",
        f"copied along: {', '.join(printable(name) for name in report['extras']) or 'nothing'}",
        *remarks(report),
    ]
    return "\n".join(lines)

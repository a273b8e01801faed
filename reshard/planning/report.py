"""Plans and manifests in words and as JSON. Rows are grouped by layer, as plans are written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..checkpoint.companions import Left
from ..errors import printable
from ..process import worker_count
from ..resharded.layout import plan_layouts
from ..resharded.manifest import Manifest
from ..sharding.placement import Explicit, Nested, Placement, Replicate, Shard, local_shape
from ..sharding.topology import Topology

if TYPE_CHECKING:  # a plan comes with torch; a manifest is told without it
    from .plan import ReshardPlan

__all__ = ["left_report", "manifest_report", "manifest_text", "plan_report", "plan_text", "table"]

_NOTE = 1000  # characters shown of a remark


def placement_text(placement: Placement) -> str:
    """A placement as torch would write it."""
    if isinstance(placement, Replicate):
        return "Replicate()"
    if isinstance(placement, Shard):
        return f"Shard({placement.dim})"
    if isinstance(placement, Explicit):
        return f"{sum(map(len, placement.boxes))} boxes"
    if isinstance(placement, Nested):
        outer = placement_text(placement.outer)
        if isinstance(placement.inner, Replicate):
            return f"{outer}, {placement.row} copies"
        return f"{outer}, {placement_text(placement.inner)}"
    blocks = placement.blocks
    packed = f"{len(blocks)}×{blocks[0]}" if len(set(blocks)) == 1 else "|".join(map(str, blocks))
    return f"PackedShard({placement.dim}, {packed})"


def gigabytes(size: int) -> str:
    """Bytes in the unit that keeps them short: 1000-based, as disks are sold."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def rows(parameters: Iterable[Any], world_size: int) -> list[dict[str, Any]]:
    """One row for each kind of parameter: those of all layers that look the same stand together."""
    found: dict[tuple, dict[str, Any]] = {}
    for parameter in parameters:
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", parameter.name)
        placement = placement_text(parameter.placement)
        row = found.setdefault(
            (pattern, parameter.shape, parameter.dtype, parameter.style, placement),
            {
                "parameter": printable(pattern),
                "count": 0,
                "shape": list(parameter.shape),
                "dtype": parameter.dtype,
                "style": parameter.style,
                "placement": placement,
                "rank_0_shape": list(local_shape(parameter.placement, parameter.shape, rank=0, world_size=world_size)),
                "reason": parameter.reason,
            },
        )
        row["count"] += 1
    return list(found.values())


def table(lines: Sequence[Sequence[Any]], *, width: int | None = None, shorten: Sequence[tuple[int, int]] = ()) -> str:
    """Left-aligned columns; a column where every cell is empty is left out.

    Where the table is wider than `width` characters, cells lose their middle: first those of the columns that `shorten`
    names, in that order, each down to so many characters, and then the widest.
    """
    cells = [[("" if cell is None else printable(cell)) for cell in line] for line in lines]
    kept = [i for i in range(len(cells[0])) if any(line[i] for line in cells[1:])]
    widths = {i: max(len(line[i]) for line in cells) for i in kept}
    gap = "  "
    if width is not None:
        over = sum(widths.values()) + len(gap) * len(kept) - width
        for column, least in shorten:
            if column in widths:
                taken = max(0, min(over, widths[column] - least))
                widths[column] -= taken
                over -= taken
        while over > 0 and max(widths.values()) > 1:
            widths[max(widths, key=widths.__getitem__)] -= 1
            over -= 1
    return "\n".join(
        (gap + gap.join(_middle_out(line[i], widths[i]).ljust(widths[i]) for i in kept)).rstrip() for line in cells
    )


def _middle_out(text: str, width: int) -> str:
    """`text` in so many characters. Its end says more than its beginning: q_proj.weight."""
    if len(text) <= width:
        return text
    end = 2 * (width - 1) // 3
    return f"{text[: width - 1 - end]}…{text[len(text) - end :] if end else ''}"


def _parameter_table(found: Sequence[Mapping[str, Any]], dtype: str, width: int | None) -> str:
    """Every row's dtype is `dtype` but where it says another."""
    lines: list[Sequence[Any]] = [("parameter", "×", "shape", "dtype", "style, or why whole", "placement", "on rank 0")]
    for row in found:
        lines.append(
            (
                row["parameter"],
                str(row["count"]),
                "×".join(map(str, row["shape"])) or "scalar",
                "" if row["dtype"] == dtype else row["dtype"],
                row["reason"] or row["style"],
                row["placement"],
                "×".join(map(str, row["rank_0_shape"])) or "scalar",
            )
        )
    return table(lines, width=width, shorten=((4, 12), (5, 12), (0, 21)))


def sizes_text(sizes: Mapping[int, str | None]) -> list[str]:
    """The legal numbers of ranks, and for the usual others why not."""
    legal = [size for size, why in sizes.items() if why is None]
    lines = ["legal tp sizes: " + ", ".join(map(str, legal))]
    usual = [size for size in sizes if size & (size - 1) == 0 and sizes[size] is not None]
    return lines + [f"  not {size}: {sizes[size]}" for size in usual[:3]]


def plan_report(plan: ReshardPlan) -> dict[str, Any]:
    """What `plan` and `--dry-run` tell."""
    from ..execution.reader import BLOCK_BYTES
    from .plan import legal_sizes

    layouts, sizes = plan_layouts(plan), legal_sizes(plan.model)
    return {
        "architecture": plan.model.architecture,
        "dtype": plan.model.dtype,
        "world_size": plan.world_size,
        "mesh": plan.topology.to_json(),
        "parameters": rows(plan.targets, plan.world_size),
        "rank_bytes": [layout.size for layout in layouts[: plan.world_size]],
        "replicated_bytes": replicated_bytes(plan.targets),
        "disk_bytes": sum(layout.size for layout in layouts),
        "memory_bytes": worker_count() * BLOCK_BYTES,
        "tied": plan.tied,
        "unused": list(plan.unused),
        "dropped": list(plan.dropped),
        "unused_rules": list(plan.model.unused_rules),
        "corrected_rules": list(plan.model.corrected_rules),
        "custom_strategies": plan.custom,
        "runtime_only": list(plan.runtime_only),
        "notes": list(plan.notes),
        "left_behind": left_report(plan.source.left),
        "ep_sizes": [size for size in range(2, plan.model.experts + 1) if plan.model.experts % size == 0],
        "tp_sizes": {str(size): why for size, why in sizes.items()},
    }


def left_report(left: Iterable[Left]) -> list[dict[str, Any]]:
    """The files of a source that are left behind, and why."""
    return [{"path": entry.path, "why": entry.why, "named_by": list(entry.named_by)} for entry in left]


def plan_text(report: Mapping[str, Any], width: int | None = None) -> str:
    """The plan's report in words; its table in at most `width` characters."""
    lines = [
        f"{report['architecture']} ({report['dtype']}) for {Topology(**report['mesh'])}",
        "",
        _parameter_table(report["parameters"], report["dtype"], width),
        "",
    ]
    ranks = report["rank_bytes"]
    lines.append(f"rank files: {gigabytes(max(ranks))} each at most, {gigabytes(sum(ranks))} in all")
    lines.append(f"replicated in every file: {gigabytes(report['replicated_bytes'])}")
    lines.append(
        f"disk needed: {gigabytes(report['disk_bytes'])}, memory: {gigabytes(report['memory_bytes'])} of blocks"
    )
    lines += _notes(report)
    if report["ep_sizes"]:
        lines.append("legal ep sizes: " + ", ".join(map(str, report["ep_sizes"])))
    lines += sizes_text({int(size): why for size, why in report["tp_sizes"].items()})
    return "\n".join(lines)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(printable, names))


def _notes(report: Mapping[str, Any]) -> list[str]:
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


def manifest_report(manifest: Manifest) -> dict[str, Any]:
    """What `inspect` tells about a resharded folder."""
    return {
        "architecture": manifest.architecture,
        "dtype": manifest.dtype,
        "world_size": manifest.world_size,
        "mesh": manifest.topology.to_json(),
        "source": {"repo_id": manifest.repo_id, "commit": manifest.commit},
        "tool": manifest.tool,
        "parameters": rows(manifest.parameters, manifest.world_size),
        "replicated_bytes": replicated_bytes(manifest.parameters),
        "ranks": [{"file": f.name, "size": f.size, "digest": f.digest} for f in manifest.rank_files],
        "extras": [record.name for record in manifest.extras],
        "tied": manifest.tied,
        "unused": list(manifest.unused_file.tensors) if manifest.unused_file else [],
        "dropped": list(manifest.dropped),
        "custom_strategies": manifest.custom,
        "runtime_only": list(manifest.runtime_only),
    }


def replicated_bytes(parameters: Iterable[Any]) -> int:
    """Bytes that every rank file repeats."""
    return sum(parameter.nbytes for parameter in parameters if isinstance(parameter.placement, Replicate))


def manifest_text(report: Mapping[str, Any], width: int | None = None) -> str:
    """The manifest's report in words; its tables in at most `width` characters."""
    origin = report["source"]["repo_id"]
    source = f" from {origin}@{report['source']['commit']}" if origin else ""
    tool = ", ".join(f"{name} {version}" for name, version in report["tool"].items())
    lines = [
        printable(f"{report['architecture']} ({report['dtype']}) for {Topology(**report['mesh'])}{source}"),
        printable(f"made by {tool}"),
        "",
        _parameter_table(report["parameters"], report["dtype"], width),
        "",
        table(
            [("rank file", "size", "digest")]
            + [(r["file"], gigabytes(r["size"]), r["digest"]) for r in report["ranks"]],
            width=width,
            shorten=((2, 16), (0, 16)),
        ),
        "",
        f"replicated in every file: {gigabytes(report['replicated_bytes'])}",
        f"copied along: {', '.join(printable(name) for name in report['extras']) or 'nothing'}",
        *_notes(report),
    ]
    return "\n".join(lines)

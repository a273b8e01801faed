"""The steps of a rehearsal, each in a process of its own: `rehearsal.py STEP FOLDER OUT OPTIONS` prints JSON.

A part and `finish` run as they are, but for what moves the bytes of weights. A part writes the header of each rank file
and leaves the rest of it a hole, with made-up digests. `finish` does not read the files again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["figures", "open_manifest", "plan", "run_finish", "run_part"]

Figures = dict[str, Any]


def main() -> None:
    """Run the step that the arguments name."""
    step, folder, out, options = sys.argv[1:]
    steps = {"plan": plan, "part": run_part, "finish": run_finish, "open": open_manifest}
    print(json.dumps(steps[step](Path(folder), Path(out), **json.loads(options))))


def figures(began: float) -> Figures:
    """Return the seconds since `began`, those of the processor since the start, and the most memory that the process
    has had, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time(), "peak": peak / 1024}


def _imported(folder: Path) -> float:
    """Import what planning a checkpoint imports, its model's module too. Returns the time now."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import reshard  # noqa: F401

    kind = json.loads((folder / "config.json").read_text())["model_type"]
    import_module(f"transformers.models.{kind}.modeling_{kind}")
    return time.perf_counter()


def plan(folder: Path, _: Path, **options: Any) -> Figures:
    """Plan a checkpoint, and lay out every rank file."""
    import reshard
    from reshard.planning.plan import plan_layouts
    from reshard.process import patient_collector

    began = _imported(folder)
    with patient_collector():
        layouts = plan_layouts(reshard.plan(folder, **options))
    return {**figures(began), "tensors": max(len(layout.slots) for layout in layouts)}


def run_part(folder: Path, out: Path, **options: Any) -> Figures:
    """Make one part, with holes for the tensors of its rank files."""
    import reshard
    from reshard.operations.convert import work

    descriptors: list[int] = []

    def write(to: Path, layouts: Sequence[Any], inputs: Any, **_: Any) -> tuple[list[Any], dict[str, str]]:
        descriptors.append(len(os.listdir("/proc/self/fd")))
        digests = {file.name: _digest(0) for file in inputs.source.files if file.name in inputs.digested}
        return [_hole(to, layout) for layout in layouts], digests

    work.write_files = write
    work.check_free_space = lambda *_: None  # holes take no room
    began = _imported(folder)
    report = reshard.convert_part(folder, out, sync=False, **options)
    number, of = report.part.number, report.part.of
    there = out.with_name(f"{out.name}.parts") / f"part-{number:05d}-of-{of:05d}"
    sizes = {name: (there / f".reshard-{name}.json").stat().st_size for name in ("part", "draft")}
    return {
        **figures(began),
        **{"written": report.written, "read": report.read, "descriptors": descriptors[0]},
        **{"record": sizes["part"], "draft": sizes["draft"]},
    }


def _hole(folder: Path, layout: Any) -> Any:
    from reshard.resharded.rank_file import FileRecord

    with open(folder / layout.name, "wb") as file:
        file.write(layout.head)
        file.truncate(layout.size)
    tensors = {slot.tensor.name: _digest(number) for number, slot in enumerate(layout.slots)}
    return FileRecord(layout.name, layout.size, _digest(0), tensors)


def _digest(number: int) -> str:
    return f"{number:032x}"


def run_finish(_: Path, out: Path, **options: Any) -> Figures:
    """Finish a folder without reading its files again."""
    import reshard
    from reshard.operations.convert import finish

    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    finish._read_again = nothing
    began = time.perf_counter()
    reshard.finish(out, sync=False)
    return {**figures(began), "manifest": (out / "reshard.json").stat().st_size}


def open_manifest(_: Path, out: Path, *, rank: int) -> Figures:
    """Read what a load reads of a folder on one rank before it maps the rank file: the manifest, and the header."""
    import torch  # noqa: F401

    from reshard.process import patient_collector
    from reshard.resharded.manifest import read_manifest
    from reshard.resharded.rank_file import read_rank_header

    began = time.perf_counter()
    with patient_collector():
        record = read_manifest(out).rank_files[rank]
        header = read_rank_header(out / record.name, record)
    return {**figures(began), "tensors": len(header.tensors)}


if __name__ == "__main__":
    main()

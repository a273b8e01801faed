"""The steps of a rehearsal, each in a process of its own: `rehearsal.py STEP FOLDER OUT OPTIONS` prints JSON.

With the option `holes`, a part and `finish` run as they are, but for what moves the bytes of weights. A part writes the
header of each rank file and leaves the rest of it a hole, with made-up digests. `finish` does not read the files again.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["compare", "figures", "open_manifest", "plan", "run_finish", "run_part"]

Figures = dict[str, Any]


def main() -> None:
    """Run the step that the arguments name."""
    step, folder, out, options = sys.argv[1:]
    steps = {"plan": plan, "part": run_part, "finish": run_finish, "open": open_manifest, "compare": compare}
    print(json.dumps(steps[step](Path(folder), Path(out), **json.loads(options))))


def figures(began: float) -> Figures:
    """Return the processor's seconds since `began`, and the most memory that the process has had, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return {"seconds": time.process_time() - began, "peak": peak / 1024}


def _imported(folder: Path) -> float:
    """Import what planning a checkpoint imports, its model's module too. Returns the processor's time now."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import reshard  # noqa: F401

    kind = json.loads((folder / "config.json").read_text())["model_type"]
    import_module(f"transformers.models.{kind}.modeling_{kind}")
    return time.process_time()


def plan(folder: Path, _: Path, **options: Any) -> Figures:
    """Plan a checkpoint, and lay out every rank file."""
    import reshard
    from reshard.planning.plan import plan_layouts
    from reshard.process import patient_collector

    began = _imported(folder)
    with patient_collector():
        layouts = plan_layouts(reshard.plan(folder, **options))
    return {**figures(began), "tensors": max(len(layout.slots) for layout in layouts)}


def run_part(folder: Path, out: Path, *, holes: bool, **options: Any) -> Figures:
    """Make one part; with `holes` in place of the tensors of its rank files."""
    import reshard
    from reshard.operations.convert import work

    def write(to: Path, layouts: Sequence[Any], inputs: Any, **_: Any) -> tuple[list[Any], dict[str, str]]:
        digests = {file.name: _digest(0) for file in inputs.source.files if file.name in inputs.digested}
        return [_hole(to, layout) for layout in layouts], digests

    if holes:
        work.write_files = write
        work.check_free_space = lambda *_: None  # holes take no room
    began, place = _imported(folder), out.with_name(f"{out.name}.parts")
    with _watched(place) as most:
        report = reshard.convert_part(folder, out, sync=False, **options)
    done = place / f"part-{report.part.number:05d}-of-{report.part.of:05d}"
    sizes = {name: (done / f".reshard-{name}.json").stat().st_size for name in ("part", "draft")}
    moved = {"written": report.written, "read": report.read}
    return {**figures(began), **moved, **most, "record": sizes["part"], "draft": sizes["draft"]}


@contextlib.contextmanager
def _watched(place: Path) -> Iterator[dict[str, int]]:
    """Watch the number of open descriptors, and the size of the journal, which is gone when a part is done. The value
    is the most that was seen of each."""
    most, stop = {"descriptors": 0, "journal": 0}, threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            most["descriptors"] = max(most["descriptors"], len(os.listdir("/proc/self/fd")))
            for path in place.glob("*/.reshard-journal"):
                with contextlib.suppress(OSError):
                    most["journal"] = max(most["journal"], path.stat().st_size)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


def _hole(folder: Path, layout: Any) -> Any:
    from reshard.resharded.rank_file import FileRecord

    with open(folder / layout.name, "wb") as file:
        file.write(layout.head)
        file.truncate(layout.size)
    tensors = {slot.tensor.name: _digest(number) for number, slot in enumerate(layout.slots)}
    return FileRecord(layout.name, layout.size, _digest(0), tensors)


def _digest(number: int) -> str:
    return f"{number:032x}"


def run_finish(_: Path, out: Path, *, holes: bool) -> Figures:
    """Finish a folder; without reading its files again if they are `holes`."""
    import reshard
    from reshard.operations.convert import finish

    if holes:
        finish._read_again = lambda *_: None
    began = time.process_time()
    reshard.finish(out, sync=False)
    return {**figures(began), "manifest": (out / "reshard.json").stat().st_size}


def compare(folder: Path, out: Path, **options: Any) -> Figures:
    """Convert at once, and compare the folder with the one that was made in parts, byte for byte."""
    import reshard

    began, one = _imported(folder), out.with_name("one")
    reshard.convert(folder, one, sync=False, **options)
    names = sorted(path.name for path in one.iterdir())
    same = names == sorted(path.name for path in out.iterdir())
    same = same and filecmp.cmpfiles(one, out, names, shallow=False)[0] == names
    return {**figures(began), "same": same}


def open_manifest(_: Path, out: Path, *, rank: int) -> Figures:
    """Read what a load reads of a folder on one rank before it maps the rank file: the manifest, and the header."""
    import torch  # noqa: F401

    from reshard.process import patient_collector
    from reshard.resharded.manifest import read_manifest
    from reshard.resharded.rank_file import read_rank_header

    began = time.process_time()
    with patient_collector():
        record = read_manifest(out).rank_files[rank]
        header = read_rank_header(out / record.name, record)
    return {**figures(began), "tensors": len(header.tensors)}


if __name__ == "__main__":
    main()

"""A rehearsal of conversions in parts at the largest sizes: everything runs but the reading and writing of weights.

    .venv/bin/python scripts/rehearse_parts.py [--layers 1,2,4] [--model "Kimi K2 in int4"]

Checkpoints are sparse files with real headers, of all layers, a half and a quarter of them. Each part of each is made
by `reshard.convert_part` in a process of its own, one after the other, with a sparse file for each rank, and
`reshard.finish` makes the folder of them. What takes as long as the bytes take to move is not rehearsed: a part's reads
and writes, and the second reading of all files by `finish`. `narrow` is a Kimi K2 with all its experts and a thousandth
of the width: everything is read and written, and the folder compared with that of one `reshard.convert`.

Seconds are the processor's, after the imports; those of a part are the median, and all else is the most. `peak` is all
memory of a process (VmHWM, libraries and mapped pages among it). The bytes that a part reads are what it fetches if the
source is elsewhere. `many tensors` is a folder of 64 ranks with 99,999 tensors each, of which only the manifest and one
rank file's header are written.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from big_checkpoints import DEEPSEEK_V3_FP8, KIMI_K2_INT4, LLAMA_405B, write
from many_tensors import write_many

STEPS = Path(__file__).with_name("rehearsal.py")


@dataclass(frozen=True)
class Case:
    """A configuration, the number of its files, and the sizes of the mesh."""

    config: dict[str, Any]
    files: int
    sizes: dict[str, int]
    holes: bool = True  # in place of the weights


NARROW = {
    **KIMI_K2_INT4,
    **{"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 64, "vocab_size": 1024},
    **{"q_lora_rank": 64, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
}
CASES = {
    "Llama 3.1 405B": Case(LLAMA_405B, 191, {"tp_size": 64}),
    "DeepSeek-V3 in fp8": Case(DEEPSEEK_V3_FP8, 163, {"tp_size": 64, "ep_size": 64}),
    "Kimi K2 in int4": Case(KIMI_K2_INT4, 62, {"tp_size": 64, "ep_size": 64}),
    "narrow": Case(NARROW, 62, {"tp_size": 64, "ep_size": 64}, holes=False),
}
MANY = {"ranks": 64, "tensors": 99_999}  # the most that a header may have
# A row: what it is, its unit, and its value in what the steps told.
ROWS: tuple[tuple[str, float, Callable[[dict[str, Any]], float]], ...] = (
    ("source tensors", 1, lambda told: told["source"][0]),
    ("source, GB", 1e9, lambda told: told["source"][1]),
    ("plan and layouts, s", 1, lambda told: told["plan"]["seconds"]),
    ("plan and layouts, peak MiB", 1, lambda told: told["plan"]["peak"]),
    ("a part, s", 1, lambda told: statistics.median(part["seconds"] for part in told["parts"])),
    ("a part, peak MiB", 1, lambda told: max(part["peak"] for part in told["parts"])),
    ("a part writes, GB, least", 1e9, lambda told: min(part["written"] for part in told["parts"])),
    ("a part writes, GB, most", 1e9, lambda told: max(part["written"] for part in told["parts"])),
    ("a part reads, GB, least", 1e9, lambda told: min(part["read"] for part in told["parts"])),
    ("a part reads, GB, most", 1e9, lambda told: max(part["read"] for part in told["parts"])),
    ("open descriptors", 1, lambda told: max(part["descriptors"] for part in told["parts"])),
    ("journal of a part, MB", 1e6, lambda told: max(part["journal"] for part in told["parts"])),
    ("record of a part, MB", 1e6, lambda told: max(part["record"] for part in told["parts"])),
    ("draft of a part, MB", 1e6, lambda told: max(part["draft"] for part in told["parts"])),
    ("manifest, MB", 1e6, lambda told: told["finish"]["manifest"]),
    ("finish, s", 1, lambda told: told["finish"]["seconds"]),
    ("finish, peak MiB", 1, lambda told: told["finish"]["peak"]),
    ("open on a rank, s", 1, lambda told: told["open"]["seconds"]),
    ("open on a rank, peak MiB", 1, lambda told: told["open"]["peak"]),
)


@click.command()
@click.option("--model", "names", multiple=True, type=click.Choice(list(CASES)), help="Only these models.")
@click.option("--parts", default=8, show_default=True, help="Number of parts.")
@click.option("--layers", default="1,2,4", show_default=True, help="Divide the number of layers by each of these.")
@click.option("--many/--no-many", default=True, help="Whether to open a manifest of very many tensors too.")
def main(names: Sequence[str], parts: int, layers: str, many: bool) -> None:
    """Rehearse conversions in parts, and print what they take."""
    for name, case in CASES.items():
        if not names or name in names:
            points = [_rehearsed(case, int(divisor), parts) for divisor in layers.split(",")]
            _print(name, case, parts, points)
    if many:
        with tempfile.TemporaryDirectory() as root:
            size = write_many(Path(root, "many"), **MANY)
            told = _step("open", Path(root), Path(root, "many"), rank=MANY["ranks"] - 1)
            click.echo(f"many tensors: {MANY['ranks']} ranks of {MANY['tensors']:,} tensors")
            click.echo(f"  manifest, MB                {size / 1e6:10,.1f}")
            click.echo(f"  open on a rank, s           {told['seconds']:10,.2f}")
            click.echo(f"  open on a rank, peak MiB    {told['peak']:10,.0f}")


def _rehearsed(case: Case, divisor: int, parts: int) -> dict[str, Any]:
    config = {**case.config, "num_hidden_layers": case.config["num_hidden_layers"] // divisor}
    with tempfile.TemporaryDirectory() as root:
        folder, out = Path(root, "source"), Path(root, "out")
        told: dict[str, Any] = {"layers": config["num_hidden_layers"]}
        told["source"] = write(folder, config, files=max(1, case.files // divisor), filled=not case.holes)
        told["plan"] = _step("plan", folder, out, **case.sizes)
        told["parts"] = [
            _step("part", folder, out, part=f"{number}/{parts}", holes=case.holes, **case.sizes)
            for number in range(1, parts + 1)
        ]
        told["finish"] = _step("finish", folder, out, holes=case.holes)
        told["open"] = _step("open", folder, out, rank=0)
        told["same"] = case.holes or _step("compare", folder, out, **case.sizes)["same"]
    return told


def _step(name: str, folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    command = [sys.executable, "-P", str(STEPS), name, str(folder), str(out), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _print(name: str, case: Case, parts: int, points: Sequence[dict[str, Any]]) -> None:
    """Print a column for each number of layers, with the ratio to the first behind it."""
    mesh = ", ".join(f"{key} {size}" for key, size in case.sizes.items())
    heads = [f"{told['layers']} layers" for told in points]
    click.echo(f"{name}: {mesh}, {parts} parts")
    click.echo(f"  {'':28}{heads[0]:>10}" + "".join(f"{head:>12}      " for head in heads[1:]))
    for row, unit, value in ROWS:
        if case.holes and "journal" in row:
            continue  # it grows with what is written
        first, *rest = (value(told) / unit for told in points)
        text = "".join(f"{other:12,.{_digits(row)}f} {other / first:4.2f}×" for other in rest)
        click.echo(f"  {row:28}{first:10,.{_digits(row)}f}{text}")
    if not case.holes:
        click.echo(f"  every byte as one convert writes it: {'yes' if all(told['same'] for told in points) else 'NO'}")


def _digits(row: str) -> int:
    """Return the digits behind the point of a row: none of what is counted, or of MiB."""
    return 0 if row.endswith("MiB") or "," not in row else 2 if row.endswith(", s") else 1


if __name__ == "__main__":
    main()

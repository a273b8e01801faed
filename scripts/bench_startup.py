"""A benchmark of start-up: whole commands on a pico checkpoint, which move next to no bytes. Medians of runs in turn.

    .venv/bin/python scripts/bench_startup.py [--repeat 7] [--beside DIR]

`cpu` is the time that the process computed, by itself and in the kernel; `wall` is what a user waits. With `--beside`,
the same commands also run from another checkout of this repository, such as a worktree of an earlier commit, and the
last column is the part of its time.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import click
from bench_common import in_turn
from big_checkpoints import LLAMA_1B, write

PICO = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
RESHARD = ["-m", "reshard"]


def commands(source: Path, folder: Path, out: Path) -> dict[str, list[str]]:
    """Return the arguments of Python for each command, by its name."""
    last = [str(out), "--overwrite", "--no-sync", "--quiet"]
    return {
        "python": ["-c", "pass"],
        "import torch": ["-c", "import torch"],
        "import transformers' models": ["-c", "import transformers.modeling_utils"],
        "reshard --help": [*RESHARD, "--help"],
        "convert": [*RESHARD, "convert", str(source), *last, "--tp-size", "2"],
        "convert tp2 to tp4": [*RESHARD, "convert", str(folder), *last, "--tp-size", "4"],
        "convert tp2 to tp3": [*RESHARD, "convert", str(folder), *last, "--tp-size", "3"],
        "verify": [*RESHARD, "verify", str(folder)],
    }


def timed(arguments: list[str], root: Path | None) -> tuple[float, float]:
    """Run Python, with the packages in `root` if it is given. Returns the seconds of CPU time and those that passed."""
    environment = {**os.environ, **({"PYTHONPATH": str(root)} if root else {})}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-P", *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)}: exit code {process.returncode}")
    return usage.ru_utime + usage.ru_stime, wall


@click.command()
@click.option("--repeat", default=7, show_default=True, help="Runs of each command; medians are printed.")
@click.option("--beside", type=click.Path(exists=True, file_okay=False), help="Another checkout to compare with.")
@click.option("--only", help="Leave out commands without this text in their names.")
def main(repeat: int, beside: str | None, only: str | None) -> None:
    """Print CPU time and wall time of each command."""
    with tempfile.TemporaryDirectory() as root:
        source, folder = Path(root, "source"), Path(root, "tp2")
        write(source, {**LLAMA_1B, **PICO, **HEADS}, filled=True)
        timed([*RESHARD, "convert", str(source), str(folder), "--tp-size", "2"], None)
        chosen = {
            name: line for name, line in commands(source, folder, Path(root, "out")).items() if (only or "") in name
        }
        places = {"here": None, **({"beside": Path(beside).resolve()} if beside else {})}
        jobs = {
            (name, place): partial(timed, line, at) for name, line in chosen.items() for place, at in places.items()
        }
        for job in jobs.values():
            job()  # once uncounted: compiles modules, and fills the page cache
        runs = in_turn(repeat, jobs)
    for name in chosen:
        found = {place: [statistics.median(one) for one in zip(*runs[name, place])] for place in places}
        line = f"  {name:28}"
        for place, (cpu, wall) in found.items():
            line += f"  {place} {cpu:6.2f} s cpu {wall:6.2f} s wall"
        if beside:
            line += "  " + " ".join(f"{here / there:5.2f} ×" for here, there in zip(found["here"], found["beside"]))
        click.echo(line)


if __name__ == "__main__":
    main()

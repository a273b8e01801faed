"""A benchmark of forwards over batch sizes, ranks and compilation: this runtime, and transformers with and without TP.

    .venv/bin/python scripts/bench_speedup.py [--repeat 2] [--layers 16] [--length 512] [--batch 1,2,4,8]

A llama of 1B shape in bf16 with random weights, on this machine's CPU, one thread a rank, gloo. A forward gives the
logits of the last token. The jobs of all sides stay loaded, and one forward runs at a time, each side in turn, so that
other work on the machine meets all alike. A forward during which other processes took more than a tenth of the machine
is repeated, `TRIES` times at most, and the least disturbed counts. The first forward of each compiled shape, which
compiles, is not counted.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from bench_common import convert, torchrun, warm
from big_checkpoints import LLAMA_1B, write

from reshard.launch.options import Batches

SIDES = (("reshard", 1), ("reshard", 2), ("transformers", 1), ("transformers", 2))  # each with its number of ranks
BATCHES = (1, 2, 4, 8)
LENGTH, LAYERS = 512, 16
DISTURBED, TRIES = 0.1, 3
PATIENCE = 900  # seconds for an answer; compiling is the longest
WORKER = """
import json, os, sys, time
import torch, torch.distributed as dist
engine, folder, length = sys.argv[1], sys.argv[2], int(sys.argv[3])
if engine == "transformers":
    from transformers import AutoModelForCausalLM
    options = {"tp_plan": "auto"} if int(os.environ["WORLD_SIZE"]) > 1 else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
else:
    import runtime
    model = runtime.load(folder, check_digests=False)
forwards = {False: model, True: torch.compile(model)}
rank = int(os.environ["RANK"])

def busy():  # seconds of all CPUs since boot, those taken by other machines of the host included
    user, nice, system, _, _, irq, softirq, steal = map(int, open("/proc/stat").readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")

def together(cpu):
    total = torch.tensor([cpu], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total)

def tell(answer):
    if rank == 0:
        print(json.dumps(answer), flush=True)

def asked():
    found = [sys.stdin.readline() if rank == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]

tell({})
for line in iter(asked, ""):
    batch, compiled = json.loads(line)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(batch))
    try:
        together(0)
        taken, before, start = time.process_time(), busy(), time.perf_counter()
        with torch.inference_mode():
            forwards[compiled](ids, use_cache=True, logits_to_keep=1)
        wall, after = time.perf_counter() - start, busy()
    except Exception as error:
        tell({"error": f"{type(error).__name__}: {error}".partition("\\n")[0]})
        break
    others = after - before - together(time.process_time() - taken)
    tell({"seconds": wall, "others": max(0.0, others / wall / os.cpu_count())})
os._exit(0)
"""


class Side:
    """A job of an engine that stays loaded, and runs one forward when it is asked to. Rank 0 reads stdin."""

    def __init__(self, script: Path, engine: str, ranks: int, folder: Path, length: int) -> None:
        self.engine, self.ranks = engine, ranks
        self.failed: dict[bool, str] = {}  # why it cannot run, eager or compiled
        self.job = subprocess.Popen(
            [*torchrun(ranks), str(script), engine, str(folder), str(length)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.job.terminate()
        self.job.communicate()

    def answer(self) -> dict[str, Any]:
        """Return the next answer; one with `error` if the job ends or says nothing for `PATIENCE` seconds."""
        ready, _, _ = select.select([self.job.stdout], [], [], PATIENCE)
        line = self.job.stdout.readline() if ready and self.job.stdout else ""
        return json.loads(line) if line else {"error": "the job ended" if ready else f"silent for {PATIENCE} s"}

    def forward(self, batch: int, compiled: bool) -> dict[str, Any] | None:
        """Return seconds, and the share of the machine that other processes took; None if this side cannot run."""
        if compiled in self.failed or False in self.failed:
            return None
        assert self.job.stdin
        self.job.stdin.write(json.dumps([batch, compiled]) + "\n")
        self.job.stdin.flush()
        found = self.answer()
        if "error" in found:
            self.failed[compiled] = found["error"]
            return None
        return found

    def undisturbed(self, batch: int, compiled: bool) -> dict[str, Any] | None:
        """Run a forward again while others disturb it, and return the least disturbed."""
        runs: list[dict[str, Any]] = []
        while len(runs) < TRIES and not (runs and runs[-1]["others"] <= DISTURBED):
            run = self.forward(batch, compiled)
            if run is None:
                return None
            runs.append(run)
        return min(runs, key=lambda run: run["others"])


def measure(root: Path, *, repeat: int, layers: int, length: int, batches: Sequence[int]) -> list[dict[str, Any]]:
    """Return a row for each side, mode and batch size, with the seconds of every run; or with why it cannot run."""
    write(root / "source", {**LLAMA_1B, "num_hidden_layers": layers}, filled=True)
    folders = {}
    for engine, ranks in SIDES:
        folders[engine, ranks] = root / "source"
        if engine == "reshard":
            folders[engine, ranks] = root / f"tp{ranks}"
            convert(root / "source", root / f"tp{ranks}", ranks)
    for folder in set(folders.values()):
        warm(folder)
    script = root / "worker.py"
    script.write_text(WORKER)
    runs: dict[tuple[str, int, bool, int], list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        sides = []
        for (engine, ranks), folder in folders.items():
            side = stack.enter_context(Side(script, engine, ranks, folder, length))
            sides.append(side)
            if "error" in side.answer() or side.forward(batches[0], False) is None:  # loaded one by one, and warm
                side.job.kill()
                sys.exit(side.job.communicate()[1])
        for compiled in (False, True):
            for turn in range(-compiled, repeat):
                for batch in batches:
                    for side in sides:
                        run = side.forward(batch, compiled) if turn < 0 else side.undisturbed(batch, compiled)
                        if run is not None and turn >= 0:
                            runs.setdefault((side.engine, side.ranks, compiled, batch), []).append(run)
    rows = [
        {
            **{"engine": engine, "ranks": ranks, "compiled": compiled, "batch": batch},
            **{"layers": layers, "length": length},
            "seconds": [round(run["seconds"], 4) for run in found],
            "others": [round(run["others"], 3) for run in found],
        }
        for (engine, ranks, compiled, batch), found in runs.items()
    ]
    failed = [
        {"engine": side.engine, "ranks": side.ranks, "compiled": compiled, "error": why}
        for side in sides
        for compiled, why in side.failed.items()
    ]
    return rows + failed


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print each row, beside the same batch size on one rank of this runtime, not compiled."""
    base = {
        row["batch"]: statistics.median(row["seconds"])
        for row in rows
        if "seconds" in row and (row["engine"], row["ranks"], row["compiled"]) == ("reshard", 1, False)
    }
    for row in rows:
        name = f"{row['engine']} tp {row['ranks']}{', compiled' * row['compiled']}"
        if "error" in row:
            click.echo(f"  {name:28} not measured: {row['error']}")
            continue
        seconds, runs = statistics.median(row["seconds"]), row["seconds"]
        click.echo(
            f"  {name:28} batch {row['batch']:<3} {seconds:7.3f} s  ({min(runs):.3f} to {max(runs):.3f})"
            f"  {base[row['batch']] / seconds:5.2f} ×  others {max(row['others']):4.0%}"
        )


@click.command()
@click.option("--repeat", default=2, show_default=True)
@click.option("--layers", default=LAYERS, show_default=True)
@click.option("--length", default=LENGTH, show_default=True, help="Tokens of each prompt.")
@click.option("--batch", type=Batches(), default=",".join(map(str, BATCHES)), show_default=True)
def main(repeat: int, layers: int, length: int, batch: tuple[int, ...]) -> None:
    """Print seconds, their range, and the speed-up over one rank of this runtime that is not compiled."""
    root = Path(tempfile.mkdtemp())
    try:
        show(measure(root, repeat=repeat, layers=layers, length=length, batches=batch))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()

"""A benchmark of forwards over batch sizes, ranks and compilation: this runtime, and transformers with and without TP.

    .venv/bin/python scripts/bench_speedup.py [--budget 100] [--layers 16] [--length 512] [--batch 1,2,4,8]

A llama of 1B shape in bf16 with random weights, on this machine's CPU, one thread a rank, gloo. A forward gives the
logits of the last token. The jobs of all sides stay loaded, and one forward runs at a time. A round runs every side
once for each batch size, so that other work on the machine meets all alike. `waited` is the share of a forward in which
a rank was ready to run and had no CPU, since other processes had them. Of several rounds, the run that waited least
counts. A forward that compiled something does not count, and is run again.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
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
BUDGET = 100.0  # seconds: no round of eager forwards, or of compiled ones, begins later than this after the first
_COMPILES = 4  # times that a forward may compile for a new shape; dynamo gives up after 8
PATIENCE = 900  # seconds for an answer; compiling is the longest
WORKER = """
import json, os, sys, time
import torch, torch.distributed as dist
from torch._dynamo.utils import counters
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

def waited():  # seconds that this thread, which computes alone, was ready to run and had no CPU
    return int(open("/proc/thread-self/schedstat").read().split()[1]) / 1e9

def most(seconds):  # of all ranks; waits for all of them
    found = torch.tensor([seconds], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)

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
    graphs = counters["stats"]["unique_graphs"]
    try:
        most(0)
        before, start = waited(), time.perf_counter()
        with torch.inference_mode():
            forwards[compiled](ids, use_cache=True, logits_to_keep=1)
        wall = time.perf_counter() - start
    except Exception as error:
        tell({"error": f"{type(error).__name__}: {error}".partition("\\n")[0]})
        break
    compiling = most(counters["stats"]["unique_graphs"] - graphs) > 0
    tell({"seconds": wall, "waited": most(waited() - before) / wall, "compiling": compiling})
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
        assert self.job.stdout
        ready, _, _ = select.select([self.job.stdout], [], [], PATIENCE)
        line = self.job.stdout.readline() if ready else ""
        return json.loads(line) if line else {"error": "the job ended" if ready else f"silent for {PATIENCE} s"}

    def forward(self, batch: int, compiled: bool) -> dict[str, Any] | None:
        """Return seconds, and the share of them in which a rank waited for a CPU; None if this side cannot run."""
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

    def warm_forward(self, batch: int, compiled: bool) -> dict[str, Any] | None:
        """Run a forward, again while it has to compile something."""
        for _ in range(_COMPILES):
            run = self.forward(batch, compiled)
            if run is None or not run["compiling"]:
                return run
        self.failed[compiled] = f"it compiles each of {_COMPILES} forwards of one shape anew"
        return None


def measure(root: Path, *, budget: float, layers: int, length: int, batches: Sequence[int]) -> list[dict[str, Any]]:
    """Return a row for each side, mode and batch size, with seconds and `waited` of its runs, the one that
    waited least first; or with why it cannot run."""
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
            end = time.monotonic() + budget
            while True:
                for batch in batches:
                    for side in sides:
                        run = side.warm_forward(batch, compiled)
                        if run is not None:
                            runs.setdefault((side.engine, side.ranks, compiled, batch), []).append(run)
                if time.monotonic() >= end:
                    break
    for found in runs.values():
        found.sort(key=lambda run: run["waited"])
    rows = [
        {
            **{"engine": engine, "ranks": ranks, "compiled": compiled, "batch": batch},
            **{"layers": layers, "length": length},
            "seconds": [round(run["seconds"], 4) for run in found],
            "waited": [round(run["waited"], 3) for run in found],
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
        row["batch"]: row["seconds"][0]
        for row in rows
        if "seconds" in row and (row["engine"], row["ranks"], row["compiled"]) == ("reshard", 1, False)
    }
    for row in rows:
        name = f"{row['engine']} tp {row['ranks']}{', compiled' * row['compiled']}"
        if "error" in row:
            click.echo(f"  {name:28} not measured: {row['error']}")
            continue
        seconds, *_ = runs = row["seconds"]
        click.echo(
            f"  {name:28} batch {row['batch']:<3} {seconds:7.3f} s  ({min(runs):.3f} to {max(runs):.3f})"
            f"  {base[row['batch']] / seconds:5.2f} ×  waited {row['waited'][0]:4.0%}"
        )


@click.command()
@click.option("--budget", default=BUDGET, show_default=True, help="Seconds of rounds: eager, and compiled.")
@click.option("--layers", default=LAYERS, show_default=True)
@click.option("--length", default=LENGTH, show_default=True, help="Tokens of each prompt.")
@click.option("--batch", type=Batches(), default=",".join(map(str, BATCHES)), show_default=True)
def main(budget: float, layers: int, length: int, batch: tuple[int, ...]) -> None:
    """Print seconds, their range, and the speed-up over one rank of this runtime that is not compiled."""
    root = Path(tempfile.mkdtemp())
    try:
        show(measure(root, budget=budget, layers=layers, length=length, batches=batch))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()

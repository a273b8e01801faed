"""Start of a tensor-parallel process on CPU: this runtime against transformers' `from_pretrained(tp_plan="auto")`.

    .venv/bin/python scripts/bench_load.py [--repeat 5] [--ranks 2] [--layers 16]

One thread a rank, gloo, a llama of 1B shape in bf16, its files in the page cache; interleaved, medians. `imports` ends
when the libraries and the model's own module are there, `load` when the model is ready, `first` is a forward of one
token. Memory is the process's own: mapped pages of the page cache are not in it.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from big_checkpoints import LLAMA_1B, write

PHASES = ("imports", "load", "first", "anonymous")
WORKER = """
import time
start = time.perf_counter()
import json, os, sys
import torch
import transformers.models.llama.modeling_llama
kind, folder = sys.argv[1], sys.argv[2]
if kind == "transformers":
    from transformers import AutoModelForCausalLM
    import torch.distributed.tensor
else:
    import runtime
imported = time.perf_counter()
if kind == "transformers":
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
else:
    model = runtime.load(folder, check_digests=kind == "reshard")
loaded = time.perf_counter()
with torch.inference_mode():
    model(torch.tensor([[1]]))
done = time.perf_counter()
anonymous = next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous:"))
if os.environ["RANK"] == "0":
    print(json.dumps([imported - start, loaded - imported, done - loaded, anonymous / 1024]), flush=True)
torch.distributed.barrier()
os._exit(0)
"""


def job(script: Path, kind: str, folder: Path, ranks: int) -> list[float]:
    """What rank 0 measured in one torchrun job."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, str(script), kind, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@click.command()
@click.option("--repeat", default=5, show_default=True)
@click.option("--ranks", default=2, show_default=True)
@click.option("--layers", default=16, show_default=True)
def main(repeat: int, ranks: int, layers: int) -> None:
    """Print seconds of each phase, and memory."""
    root = Path(tempfile.mkdtemp())
    script = root / "worker.py"
    script.write_text(WORKER)
    try:
        source, out = root / "source", root / "out"
        _, size = write(source, {**LLAMA_1B, "num_hidden_layers": layers}, filled=True)
        command = [sys.executable, "-m", "reshard", "convert", str(source), str(out), "--tp-size", str(ranks)]
        subprocess.run([*command, "--no-sync"], check=True, stdout=subprocess.DEVNULL)
        kinds = {"reshard": out, "reshard, no digests": out, "transformers": source}
        runs: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
        for _ in range(repeat):
            for kind, folder in kinds.items():
                runs[kind].append(job(script, kind, folder, ranks))
    finally:
        shutil.rmtree(root)
    median = {kind: dict(zip(PHASES, map(statistics.median, zip(*found)))) for kind, found in runs.items()}
    theirs = median["transformers"]
    click.echo(f"{size / 1e9:.2f} GB on {ranks} ranks, medians of {repeat}")
    for kind, found in median.items():
        total = found["imports"] + found["load"] + found["first"]
        click.echo(
            f"  {kind:20} imports {found['imports']:5.2f} s   load {found['load']:6.3f} s"
            f" ({theirs['load'] / found['load']:5.1f} × faster)   first forward {found['first']:6.3f} s"
            f"   all {total:5.2f} s   memory {found['anonymous']:6.0f} MiB"
        )


if __name__ == "__main__":
    main()

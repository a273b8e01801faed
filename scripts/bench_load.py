"""A benchmark of a tensor-parallel start on CPU: this runtime against transformers' `tp_plan="auto"`.

    .venv/bin/python scripts/bench_load.py [--repeat 5] [--ranks 2] [--layers 16]

One thread a rank, gloo, a llama of 1B shape in bf16, its files in the page cache; in turn, medians. `imports` ends when
the libraries and the model's own module are there, `load` when the model is ready; `first` is a forward of one token.
Memory is the process's own, without mapped pages of the page cache. The parts of our load are shown too: the rank file
is digested while the model is built (and would be while its module is imported), and `read` is what then remains.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path

import click
from bench_common import convert, in_turn, rank_zero, warm
from big_checkpoints import LLAMA_1B, write

KINDS = {"reshard": "out", "reshard, no digests": "out", "transformers": "source"}
WORKER = """
import time
start = time.perf_counter()
import json, os, sys
kind, folder = sys.argv[1], sys.argv[2]
if kind == "transformers":
    import torch
    from transformers import AutoModelForCausalLM
    import torch.distributed.tensor
    import transformers.models.llama.modeling_llama
else:
    import runtime
    import torch
    from reshard.process import patient_collector
    with patient_collector():  # as while loading, which would import it
        import transformers.models.llama.modeling_llama
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
    parts = getattr(model, "reshard_seconds", {})
    found = {"imports": imported - start, "load": loaded - imported, "first": done - loaded}
    print(json.dumps({**found, "memory": anonymous / 1024, **{"of it " + name: parts[name] for name in parts}}))
    sys.stdout.flush()
if torch.distributed.is_initialized():  # transformers makes no group for one rank
    torch.distributed.barrier()
os._exit(0)
"""


@click.command()
@click.option("--repeat", default=5, show_default=True)
@click.option("--ranks", default=2, show_default=True)
@click.option("--layers", default=16, show_default=True)
def main(repeat: int, ranks: int, layers: int) -> None:
    """Print seconds of each phase, and memory."""
    root = Path(tempfile.mkdtemp())
    try:
        _, size = write(root / "source", {**LLAMA_1B, "num_hidden_layers": layers}, filled=True)
        click.echo(f"{size / 1e9:.2f} GB on {ranks} ranks, medians of {repeat}")
        show(measure(root, ranks, repeat))
    finally:
        shutil.rmtree(root)


def measure(root: Path, ranks: int, repeat: int) -> dict[str, list[dict[str, float]]]:
    """Return what each run of each kind of start took, phase by phase. `root` has the checkpoint `source`."""
    shutil.rmtree(root / "out", ignore_errors=True)
    convert(root / "source", root / "out", ranks)
    warm(root / "source")
    warm(root / "out")
    jobs = {kind: partial(rank_zero, WORKER, [kind, str(root / folder)], ranks) for kind, folder in KINDS.items()}
    return in_turn(repeat, jobs)


def show(runs: dict[str, list[dict[str, float]]]) -> None:
    """Print the medians of each kind of start."""
    median = {
        kind: {phase: statistics.median(run[phase] for run in found) for phase in found[0]}
        for kind, found in runs.items()
    }
    theirs = median["transformers"]
    for kind, found in median.items():
        total = found["imports"] + found["load"] + found["first"]
        click.echo(
            f"  {kind:20} imports {found['imports']:5.2f} s   load {found['load']:6.3f} s"
            f" ({theirs['load'] / found['load']:5.1f} × faster)   first forward {found['first']:6.3f} s"
            f"   all {total:5.2f} s   memory {found['memory']:6.0f} MiB"
        )
        parts = {name.removeprefix("of it "): value for name, value in found.items() if name.startswith("of it ")}
        if parts:
            click.echo(f"  {'':20} {', '.join(f'{name} {1e3 * value:.0f}' for name, value in parts.items())} ms")


if __name__ == "__main__":
    main()

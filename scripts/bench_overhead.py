"""A benchmark of the overhead of tensor parallelism in a forward, without collectives: ours and transformers'.

    .venv/bin/python scripts/bench_overhead.py [--repeat 5]

The forward of one token through 16 narrow layers spends its time in Python, and a fake process group answers every
collective at once. So the time that a sharded model takes beyond the unsharded one is the overhead of its calls.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import click
from bench_common import convert, in_turn
from big_checkpoints import LLAMA_1B, write

NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
WORKER = """
import contextlib, json, os, sys, time
os.environ.update(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
kind, folder = sys.argv[1], sys.argv[2]
import torch
import torch.distributed as dist
torch.set_num_threads(1)
if kind != "unsharded":
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
if kind == "reshard":
    import runtime, runtime.loading.load
    def agree(store, info, failure, *arguments, **options):  # the other rank is not there
        if failure:
            raise failure
    runtime.loading.load.agree = agree
    runtime.loading.load.connect = lambda *_: dist.HashStore()  # a fake one holds nothing
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = runtime.load(folder, mesh)
else:
    from transformers import AutoModelForCausalLM
    plan = {"tp_plan": "auto"} if kind == "transformers" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **plan).eval()
token, took = torch.tensor([[1]]), []
with torch.inference_mode():
    for _ in range(220):
        start = time.perf_counter()
        model(token, use_cache=False)
        took.append(time.perf_counter() - start)
print(json.dumps(sorted(took[20:])[100]))
sys.stdout.flush()
os._exit(0)
"""


def job(kind: str, folder: Path) -> float:
    """Return the median seconds of a forward in one process."""
    done = subprocess.run([sys.executable, "-P", "-c", WORKER, kind, str(folder)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


@click.command()
@click.option("--repeat", default=5, show_default=True, help="Processes of each kind; medians are printed.")
def main(repeat: int) -> None:
    """Print milliseconds of a forward and what sharding adds."""
    with tempfile.TemporaryDirectory() as root:
        source, out = Path(root, "source"), Path(root, "out")
        write(source, {**LLAMA_1B, **NARROW, "head_dim": 16, "vocab_size": 1024}, filled=True)
        convert(source, out, 2)
        folders = {"unsharded": source, "reshard": out, "transformers": source}
        runs = in_turn(repeat, {kind: partial(job, kind, folder) for kind, folder in folders.items()})
    median = {kind: statistics.median(found) for kind, found in runs.items()}
    alone = median["unsharded"]
    click.echo(f"forward of one token, 16 layers, rank 0 of 2, no time in collectives; medians of {repeat} processes")
    for kind, seconds in median.items():
        click.echo(f"  {kind:14} {1e3 * seconds:6.2f} ms   {1e3 * (seconds - alone):+6.2f} ms")
    share = (median["reshard"] - alone) / (median["transformers"] - alone)
    click.echo(f"  overhead of reshard: {share:.0%} of transformers'")


if __name__ == "__main__":
    main()

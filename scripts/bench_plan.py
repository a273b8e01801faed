"""A benchmark of planning at scale: time and memory of `reshard.plan` on checkpoints of sparse files, without disk.

    .venv/bin/python scripts/bench_plan.py [--repeat 3]

Each case runs in a process of its own. `plan` is the time of `reshard.plan` after the imports, and `imports` the time
of those (the model's own module included). `memory` is the anonymous memory of the process at the end.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from big_checkpoints import DEEPSEEK_V3, DEEPSEEK_V3_FP8, KIMI_K2_INT4, LLAMA_70B, write

# Sizes, and the number of files.
MODELS = {
    "llama 70B": (LLAMA_70B, 30),
    "DeepSeek-V3": (DEEPSEEK_V3, 163),
    "in fp8": (DEEPSEEK_V3_FP8, 163),
    "Kimi K2 in int4": (KIMI_K2_INT4, 62),
}
CASES: tuple[tuple[str, dict[str, int]], ...] = (
    ("llama 70B", {"tp_size": 8}),
    ("DeepSeek-V3", {"tp_size": 16}),
    ("DeepSeek-V3", {"tp_size": 16, "ep_size": 16}),
    ("in fp8", {"tp_size": 16}),
    ("in fp8", {"tp_size": 1, "ep_size": 16}),
    ("in fp8", {"tp_size": 16, "ep_size": 16}),
    ("Kimi K2 in int4", {"tp_size": 16}),
    ("Kimi K2 in int4", {"tp_size": 16, "ep_size": 16}),
)
MEASURE = """
import json, resource, sys, time
start = time.perf_counter()
import reshard, torch, transformers
from reshard.operations.plan import plan
from reshard.planning.plan import plan_layouts
from importlib import import_module
kind = json.load(open(sys.argv[1] + "/config.json"))["model_type"]
import_module(f"transformers.models.{kind}.modeling_{kind}")
imported = time.perf_counter()
planned = plan(sys.argv[1], **json.loads(sys.argv[2]))
done = time.perf_counter()
plan_layouts(planned)
laid = time.perf_counter()
anonymous = next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous:"))
print(json.dumps([imported - start, done - imported, laid - done, anonymous / 1024]))
"""


@click.command()
@click.option("--repeat", default=3, show_default=True, help="Runs of each case; medians are printed.")
def main(repeat: int) -> None:
    """Plan a 70B llama, a DeepSeek-V3 and a Kimi K2, and print how long it takes."""
    with tempfile.TemporaryDirectory() as root:
        tensors = {name: write(Path(root, name), sizes, files=files)[0] for name, (sizes, files) in MODELS.items()}
        click.echo(f"{'case':16} {'tensors':>8}  {'mesh':28} {'imports':>8} {'plan':>8} {'layout':>8} {'memory':>9}")
        for name, sizes in CASES:
            command = [sys.executable, "-P", "-c", MEASURE, str(Path(root, name)), json.dumps(sizes)]
            runs = [json.loads(subprocess.check_output(command, text=True)) for _ in range(repeat)]
            imports, plan, layout, memory = map(statistics.median, zip(*runs))
            mesh = ", ".join(f"{key} {size}" for key, size in sizes.items())
            took = " ".join(f"{seconds:6.2f} s" for seconds in (imports, plan, layout))
            click.echo(f"{name:16} {tensors[name]:8,}  {mesh:28} {took} {memory:6.0f} MiB")


if __name__ == "__main__":
    main()

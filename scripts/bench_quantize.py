"""A benchmark of `reshard convert --quantize` against the libraries whose bytes it makes, one core each, in one run.

    .venv/bin/python scripts/bench_quantize.py [--folder DIR] [--repeat 3] [--layers 4] [--kind nf4] …

Figures are megabytes of bf16 a second of a core: of processor time, so that other work on the machine matters little.
`reshard` is the whole command with one worker, less that of `--dry-run`: it reads, quantizes, digests and writes the
rank files, and digests what the quantized checkpoint would be. `library` only quantizes, matrix by matrix, with one
thread: bitsandbytes, or transformers' Fp8Quantize. `transformers` is a process that loads the checkpoint quantized and
saves it, less one that only imports the same, with the threads that it takes by itself; it has no fp8 without a GPU.
Peaks are of anonymous memory.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import click
from bench_common import in_turn, warm
from big_checkpoints import LLAMA_1B, write

RESHARD = [sys.executable, "-P", "-m", "reshard", "convert"]
KINDS = ("nf4", "fp4", "int8", "fp8")
MODEL = {**LLAMA_1B, "vocab_size": 512}  # so that nearly all weights are quantized
_IMPORTS = """
import sys, torch
from pathlib import Path
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit
kind, source, out = sys.argv[1:]
"""
_LIBRARY = """
torch.set_num_threads(1)
class Quantizer:
    quantization_config = FineGrainedFP8Config()
how = {
    "int8": lambda weight: int8_vectorwise_quant(weight.half()),
    "fp8": lambda weight: Fp8Quantize(Quantizer).convert({"weight": weight}),
}.get(kind, lambda weight: quantize_4bit(weight, blocksize=64, quant_type=kind))
for path in sorted(Path(source).glob("*.safetensors")):
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            if ".layers." in name and "norm" not in name:
                how(file.get_tensor(name))
"""
_TRANSFORMERS = """
options = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
model = AutoModelForCausalLM.from_pretrained(source, quantization_config=BitsAndBytesConfig(**options))
model.save_pretrained(out)
"""


def commands_of(kind: str, source: Path, out: Path) -> dict[str, list[str]]:
    """Return, by name, the commands that are run in turn."""
    convert = [*RESHARD, str(source), str(out), "-tp", "2", "--quantize", kind, "--workers", "1", "--no-sync"]
    script = [sys.executable, "-P", "-c"]
    words = [kind, str(source), str(out)]
    found = {
        "dry run": [*convert, "--dry-run"],
        "reshard": convert,
        "imports": [*script, _IMPORTS, *words],
        "library": [*script, _IMPORTS + _LIBRARY, *words],
    }
    return found if kind == "fp8" else {**found, "transformers": [*script, _IMPORTS + _TRANSFORMERS, *words]}


def timed(command: list[str], out: Path) -> tuple[float, int]:
    """Run a command. Returns its seconds of processor time, and the peak of its anonymous memory in bytes."""
    shutil.rmtree(out, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.01)
    if process.returncode:
        sys.exit(f"failed: {' '.join(command)[:200]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak


def measure(kind: str, source: Path, out: Path, size: int, repeat: int) -> dict[str, tuple[list[float], float]]:
    """Return, by who quantizes, MB of bf16 a second of a core for each run, and the peak of memory in MB."""
    commands = commands_of(kind, source, out)
    runs = in_turn(repeat, {name: partial(timed, command, out) for name, command in commands.items()})
    found = {}
    for name, less in (("reshard", "dry run"), ("library", "imports"), ("transformers", "imports")):
        if name in runs:
            start = statistics.median(seconds for seconds, _ in runs[less])
            rates = [size / max(seconds - start, 1e-3) / 1e6 for seconds, _ in runs[name]]
            peaks = [max(peak for _, peak in runs[which]) for which in (name, less)]
            found[name] = (rates, (peaks[0] - peaks[1]) / 1e6)
    return found


def _anonymous(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


@click.command()
@click.option("--folder", type=click.Path(file_okay=False), help="Where to work. [default: a temporary folder]")
@click.option("--repeat", default=3, show_default=True)
@click.option("--layers", default=4, show_default=True, help="Number of layers, of 122 MB each.")
@click.option("--kind", "kinds", multiple=True, default=KINDS, show_default=True)
def main(folder: str | None, repeat: int, layers: int, kinds: tuple[str, ...]) -> None:
    """Print the rate of each kind, and the peak of memory."""
    root = Path(tempfile.mkdtemp(dir=folder))
    source, out = root / "source", root / "out"
    try:
        _, size = write(source, {**MODEL, "num_hidden_layers": layers}, filled=True)
        warm(source)
        print(f"{size / 1e6:.0f} MB in bf16, medians of {repeat}, on {os.cpu_count()} CPUs")
        for kind in kinds:
            print(f"{kind}")
            for name, (rates, memory) in measure(kind, source, out, size, repeat).items():
                print(f"  {name:12}  {statistics.median(rates):7.0f} MB/s a core  {memory:6.0f} MB above the imports")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()

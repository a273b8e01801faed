"""A benchmark of `reshard convert` against `cp -r` of the same folder, in turn in one run; medians and ratios.

    .venv/bin/python scripts/bench_convert.py [--folder DIR] [--repeat 5] [--case dense] [--peers] …

`copy` is the whole process less that of `--dry-run`, which is imports and planning. `cp+sync` waits for the disk as
`reshard` does by default. The source is in the page cache, except in the case `cold`, and every command finds memory in
the same state. The peers are a script that loads the whole checkpoint and splits it, and transformers' tensor-parallel
load followed by a save of torch's distributed checkpoint, under torchrun.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click
from bench_common import in_turn, same_memory, torchrun, warm
from big_checkpoints import LLAMA_1B, QWEN3_MOE, QWEN3_MOE_FP8, QWEN3_MOE_INT4, write

REST = 4.0  # seconds before each command
RESHARD = [sys.executable, "-P", "-m", "reshard", "convert"]
LOAD_AND_SPLIT = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
source, out, ranks = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
out.mkdir()
state = {}
for path in sorted(source.glob("*.safetensors")):
    state.update(load_file(path))
for rank in range(ranks):
    parts = {name: tensor.chunk(ranks)[rank].contiguous() for name, tensor in state.items()}
    save_file(parts, out / f"{rank}.safetensors")
"""
TP_AND_DCP = """
import sys
import torch.distributed as dist, torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
dcp.save({"model": model.state_dict()}, checkpoint_id=sys.argv[2])
dist.barrier()
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Case:
    """A checkpoint, how it is cut, whether the source is dropped from the page cache before every run, and for how
    many ranks it has been cut before."""

    config: dict
    options: tuple[str, ...]
    cold: bool = False
    cut_before: int | None = None

    def of(self, layers: int | None) -> Case:
        """Return the case with another number of layers, if one is given."""
        return replace(self, config={**self.config, "num_hidden_layers": layers}) if layers else self


CASES = {
    **{f"dense tp{tp}": Case(LLAMA_1B, ("--tp-size", str(tp))) for tp in (2, 4, 8)},
    "dense cast": Case(LLAMA_1B, ("--tp-size", "4", "--dtype", "float16")),
    "dense tp2 to tp4": Case(LLAMA_1B, ("--tp-size", "4"), cut_before=2),
    "dense cold": Case(LLAMA_1B, ("--tp-size", "4"), cold=True),
    "experts tp4": Case(QWEN3_MOE, ("--tp-size", "4")),
    "experts fp8 tp4": Case(QWEN3_MOE_FP8, ("--tp-size", "4")),
    "experts int4 tp4": Case(QWEN3_MOE_INT4, ("--tp-size", "4")),
    "experts ep4": Case(QWEN3_MOE, ("--tp-size", "4", "--ep-size", "4")),
}


def contenders(source: Path, out: Path, case: Case, *, peers: bool) -> dict[str, list[list[str]]]:
    """Return, by name, the commands that are timed together."""
    convert = [*RESHARD, str(source), str(out), *case.options]
    found = {
        "cp": [["cp", "-r", str(source), str(out)]],
        "cp+sync": [["cp", "-r", str(source), str(out)], ["sync"]],
        "dry run": [[*convert, "--dry-run"]],
        "reshard": [convert],
        "reshard --no-sync": [[*convert, "--no-sync"]],
    }
    if peers:
        ranks = case.options[1]
        script = out.with_name("peer.py")
        script.write_text(TP_AND_DCP)
        found["load and split"] = [[sys.executable, "-P", "-c", LOAD_AND_SPLIT, str(source), str(out), ranks]]
        found["transformers + DCP"] = [[*torchrun(int(ranks)), str(script), str(source), str(out)]]
    return found


def timed(commands: list[list[str]], prepare: Callable[[], None]) -> float:
    """Return the seconds that the commands take together."""
    prepare()
    start = time.perf_counter()
    for command in commands:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return time.perf_counter() - start


def drop_from_cache(source: Path) -> None:
    """Ask the kernel to forget the files' pages."""
    for path in source.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


@click.command()
@click.option("--folder", type=click.Path(file_okay=False), help="Where to work. [default: a temporary folder]")
@click.option("--repeat", default=5, show_default=True)
@click.option("--rest", default=REST, show_default=True, help="Seconds to wait before each command.")
@click.option("--case", "names", multiple=True, help=f"Some of: {', '.join(CASES)}. [default: all]")
@click.option("--layers", type=int, help="Number of layers.  [default: the configuration's]")
@click.option(
    "--peers",
    is_flag=True,
    help="In the cases `dense tp…`, also run the other tools. It is slow and needs memory for the whole model.",
)
def main(
    folder: str | None,
    repeat: int,
    rest: float,
    names: tuple[str, ...],
    layers: int | None,
    peers: bool,
) -> None:
    """Print seconds and ratios for each case."""
    root = Path(tempfile.mkdtemp(dir=folder))
    try:
        for name, case in CASES.items():
            if not names or any(name.startswith(chosen) for chosen in names):
                peered = peers and name.startswith("dense tp") and not case.cut_before
                count, size, seconds = measure(case.of(layers), root=root, repeat=repeat, rest=rest, peers=peered)
                click.echo(f"\n{name}: {count:,} tensors, {size / 1e9:.2f} GB, medians of {repeat}")
                show(seconds)
    finally:
        shutil.rmtree(root)


def measure(
    case: Case, *, root: Path, repeat: int, rest: float, peers: bool = False, only: Collection[str] = ()
) -> tuple[int, int, dict[str, list[float]]]:
    """Return the checkpoint's tensors and bytes, and the seconds of each contender's runs; of some, if `only` names
    them."""
    source, out = root / "source", root / "out"
    count, size = write(source, case.config, filled=True)
    if case.cut_before:
        whole = source.rename(root / "whole")
        timed([[*RESHARD, str(whole), str(source), "--tp-size", str(case.cut_before)]], lambda: None)
        shutil.rmtree(whole)
    warm(source)

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        if case.cold:
            drop_from_cache(source)
        same_memory(rest)

    found = contenders(source, out, case, peers=peers)
    commands = {name: steps for name, steps in found.items() if not only or name in only}
    seconds = in_turn(repeat, {name: partial(timed, steps, prepare) for name, steps in commands.items()})
    shutil.rmtree(source)
    shutil.rmtree(out, ignore_errors=True)
    return count, size, seconds


def show(seconds: dict[str, list[float]]) -> None:
    """Print the medians of a case, and their ratios."""
    median = {contender: statistics.median(runs) for contender, runs in seconds.items()}
    for contender, value in median.items():
        low, high = min(seconds[contender]), max(seconds[contender])
        click.echo(f"  {contender:20} {value:6.2f} s  ({low:.2f} to {high:.2f})  {value / median['cp']:5.2f} × cp")
    copy, quick = (median[kind] - median["dry run"] for kind in ("reshard", "reshard --no-sync"))
    click.echo(f"  copy, in time with the disk   {copy:6.2f} s  {copy / median['cp+sync']:5.2f} × cp+sync")
    click.echo(f"  copy, --no-sync               {quick:6.2f} s  {quick / median['cp']:5.2f} × cp")
    whole = median["reshard"]
    click.echo(f"  whole process                 {whole:6.2f} s  {whole / median['cp+sync']:5.2f} × cp+sync")
    for peer in ("load and split", "transformers + DCP"):
        if peer in median:
            click.echo(f"  {peer:28}  {median[peer] / median['reshard --no-sync']:5.1f} × reshard --no-sync")


if __name__ == "__main__":
    main()

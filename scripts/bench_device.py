"""A benchmark of a rank file onto a GPU: this runtime's reader, `load_file` of safetensors and a pinned copy, in turn.

    .venv/bin/python scripts/bench_device.py [--repeat 5] [--layers 16] [--device cuda]

The file, a llama of 1B shape in bf16, is in the page cache. The pinned copy is of memory that is there already, so no
reader of a file can be quicker. With `--device cpu` the same code runs without a GPU, which shows only that it runs.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import click
import torch
from bench_common import convert, in_turn, warm
from big_checkpoints import LLAMA_1B, write
from safetensors.torch import load_file

from reshard.process import worker_count
from reshard.resharded.manifest import read_manifest
from runtime.loading.pinned import read_rank_file

PINNED_BYTES = 256 << 20


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Return the seconds until everything is on the device."""
    start = time.perf_counter()
    kept = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took = time.perf_counter() - start
    del kept
    return took


def ours(folder: Path, device: torch.device, *, digests: bool) -> object:
    record = read_manifest(folder).rank_files[0]
    with ThreadPoolExecutor(worker_count()) as pool:
        return read_rank_file(folder / record.name, record, device, pool, digests=digests)()


def pinned_copies(pinned: torch.Tensor, target: torch.Tensor, size: int) -> None:
    for _ in range(0, size, PINNED_BYTES):
        target.copy_(pinned, non_blocking=True)


@click.command()
@click.option("--repeat", default=5, show_default=True)
@click.option("--layers", default=16, show_default=True)
@click.option("--device", "name", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
def main(repeat: int, layers: int, name: str) -> None:
    """Print GB/s of each, and its share of the pinned copy."""
    if name == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is available")
    device = torch.device(name, 0) if name == "cuda" else torch.device(name)
    with tempfile.TemporaryDirectory() as root:
        source, out = Path(root, "source"), Path(root, "out")
        start = time.perf_counter()
        write(source, {**LLAMA_1B, "num_hidden_layers": layers}, filled=True)
        convert(source, out, 1)
        record = read_manifest(out).rank_files[0]
        click.echo(f"{record.size / 1e9:.2f} GB onto {device}: written and cut in {time.perf_counter() - start:.0f} s")
        warm(out)
        pinned = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=name == "cuda")
        target = torch.empty(PINNED_BYTES, dtype=torch.uint8, device=device)
        contenders: dict[str, Callable[[], object]] = {
            "pinned copy": partial(pinned_copies, pinned, target, record.size),
            "reshard": partial(ours, out, device, digests=True),
            "reshard, no digests": partial(ours, out, device, digests=False),
            "load_file": partial(load_file, out / record.name, device=str(device)),
        }
        for work in contenders.values():  # warms up contexts and pinned pools
            timed(device, work)
        runs = in_turn(repeat, {kind: partial(timed, device, work) for kind, work in contenders.items()})
    median = {kind: statistics.median(found) for kind, found in runs.items()}
    click.echo(f"{worker_count()} threads, medians of {repeat}")
    for kind, seconds in median.items():
        share = median["pinned copy"] / seconds
        click.echo(f"  {kind:20} {seconds:6.3f} s  {record.size / seconds / 1e9:6.2f} GB/s  {share:4.2f} × pinned copy")


if __name__ == "__main__":
    main()

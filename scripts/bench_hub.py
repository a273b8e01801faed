"""A benchmark of `reshard convert` from a Hub of a given speed, on loopback, beside the download and the cutting alone.

They run in turn in one run; medians are printed.

    .venv/bin/python scripts/bench_hub.py [--rate 250] [--layers 8] [--repeat 3] [--folder DIR]
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import click
from bench_common import in_turn, same_memory
from big_checkpoints import LLAMA_1B, write

TESTS = Path(__file__).parent.parent / "tests" / "tools"  # has the stand-in for the Hub
RESHARD = [sys.executable, "-P", "-m", "reshard"]
DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
snapshot_download("org/model", local_dir=sys.argv[1])
"""


def serve(folder: str, rate: float, pipe: Connection) -> None:
    """Serve a Hub with one repo until the pipe closes, and send the environment that a client needs."""
    sys.path.insert(0, str(TESTS))
    from fake_hub import FakeHub

    with FakeHub() as hub:
        hub.rate = rate
        hub.create("org/model", {path.name: path.read_bytes() for path in Path(folder).iterdir()})
        pipe.send(hub.environment(Path(folder).with_name("home")))
        pipe.poll(None)


def timed(command: list[str], environment: dict[str, str], root: Path) -> float:
    """Return the seconds that the command takes, with nothing left of an earlier one."""
    for name in ("home", "out"):
        shutil.rmtree(root / name, ignore_errors=True)
    same_memory(1)
    start = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return time.perf_counter() - start


@click.command()
@click.option("--folder", type=click.Path(file_okay=False), help="Where to work. [default: a temporary folder]")
@click.option("--rate", default=250, show_default=True, help="Speed of the Hub in MB per second.")
@click.option("--layers", default=8, show_default=True, help="Layers of a llama of 1B shape.")
@click.option("--repeat", default=3, show_default=True)
def main(folder: str | None, rate: int, layers: int, repeat: int) -> None:
    """Print seconds and ratios."""
    root = Path(tempfile.mkdtemp(dir=folder))
    source, out = root / "source", root / "out"
    try:
        _, size = write(source, {**LLAMA_1B, "num_hidden_layers": layers}, files=8, filled=True)
        ours, theirs = multiprocessing.Pipe()
        hub = multiprocessing.get_context("spawn").Process(target=serve, args=(str(source), rate * 1e6, theirs))
        hub.start()
        try:
            environment = ours.recv()
            cut = [str(out), "--tp-size", "4"]
            commands = {
                "download alone": [sys.executable, "-P", "-c", DOWNLOAD, str(out)],
                "convert a local folder": [*RESHARD, "convert", str(source), *cut],
                "convert from the Hub": [*RESHARD, "convert", "org/model", *cut],
            }
            runs = {name: partial(timed, command, environment, root) for name, command in commands.items()}
            median = {name: statistics.median(found) for name, found in in_turn(repeat, runs).items()}
        finally:
            ours.close()
            theirs.close()
            hub.terminate()
            hub.join()
    finally:
        shutil.rmtree(root)
    click.echo(f"{size / 1e9:.2f} GB in 8 files at {rate} MB/s, medians of {repeat}, {os.cpu_count()} CPUs")
    for name, seconds in median.items():
        click.echo(f"  {name:24} {seconds:6.2f} s")
    *parts, together = median.values()
    longer, both = together / max(parts), together / sum(parts)
    click.echo(f"  from the Hub: {longer:.2f} × the longer of the two, {both:.2f} × one after the other")


if __name__ == "__main__":
    main()

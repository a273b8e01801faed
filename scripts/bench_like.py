"""A benchmark of `reshard convert --like` against a fresh conversion, in turn in one run; medians and ratios.

    .venv/bin/python scripts/bench_like.py [--folder DIR] [--repeat 5] [--layers 8]

The source is a llama of 1B shape that was cut before, in the page cache. Of its new weights nothing differs, the
attention, or everything. `blocks` are the bytes that a conversion takes of the disk: less than its files have where the
file system shares blocks (XFS with reflink, btrfs).
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import click
from bench_common import convert, in_turn, same_memory, warm
from big_checkpoints import LLAMA_1B, write

from reshard.files.header import read_header

RESHARD = [sys.executable, "-P", "-m", "reshard", "--quiet", "convert"]
RANKS = 4
CHANGED = {"nothing": "-", "the attention": "self_attn", "everything": ""}


def change(source: Path, part: str) -> None:
    """Change a byte in every 64th of each tensor with `part` in its name, so that no rank's piece stays as it was."""
    for path in source.glob("*.safetensors"):
        with open(path, "r+b") as file:
            for info in read_header(path, file=path.name).tensors:
                for at in range(info.start, info.end, max(1, info.nbytes // 64)) if part in info.name else ():
                    file.seek(at)
                    byte = file.read(1)
                    file.seek(at)
                    file.write(bytes([byte[0] ^ 1]))


@click.command()
@click.option("--folder", type=click.Path(file_okay=False), help="Where to work. [default: a temporary folder]")
@click.option("--repeat", default=5, show_default=True)
@click.option("--rest", default=3.0, show_default=True, help="Seconds to wait before each command.")
@click.option("--layers", default=8, show_default=True, help="Number of layers.")
def main(folder: str | None, repeat: int, rest: float, layers: int) -> None:
    """Print seconds, the bytes that were taken of the disk, and ratios."""
    root = Path(tempfile.mkdtemp(dir=folder))
    source, before, out = root / "source", root / "before", root / "out"
    try:
        _, size = write(source, {**LLAMA_1B, "num_hidden_layers": layers}, filled=True)
        convert(source, before, RANKS)
        for what, part in CHANGED.items():
            change(source, part)
            warm(source)
            blocks: dict[str, list[int]] = {}

            def run(name: str, options: tuple[str, ...], blocks: dict[str, list[int]] = blocks) -> float:
                shutil.rmtree(out, ignore_errors=True)
                same_memory(rest)
                free, start = shutil.disk_usage(root).free, time.perf_counter()
                subprocess.run([*RESHARD, str(source), str(out), *options], check=True, stdout=subprocess.DEVNULL)
                seconds = time.perf_counter() - start
                os.sync()
                blocks.setdefault(name, []).append(free - shutil.disk_usage(root).free)
                return seconds

            contenders = {"fresh": ("--tp-size", str(RANKS)), "like": ("--like", str(before))}
            times = in_turn(repeat, {name: partial(run, name, options) for name, options in contenders.items()})
            fresh, like = (statistics.median(times[name]) for name in ("fresh", "like"))
            taken = statistics.median(blocks["like"]) / max(1, statistics.median(blocks["fresh"]))
            click.echo(
                f"{what} changed, {size / 1e9:.2f} GB: fresh {fresh:.2f} s, like {like:.2f} s (× {like / fresh:.2f}),"
                f" blocks × {taken:.2f}"
            )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()

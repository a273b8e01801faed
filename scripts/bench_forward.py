"""A run of `reshard bench` on a big model: prefill and decode at tp 1 and 2, and those of transformers at tp 2.

    .venv/bin/python scripts/bench_forward.py [--repeat 3] [--layers 16] [--length 512] [--batch 1] [--plot FILE]

A llama of 1B shape in bf16 with random weights, on this machine's CPU, one thread a rank, gloo.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import click
from bench_common import convert, warm
from big_checkpoints import LLAMA_1B, write

from reshard.launch.benchmark.runs import Job, run_jobs, summary
from reshard.launch.benchmark.start import draw_report
from reshard.launch.options import Batches


@click.command()
@click.option("--repeat", default=3, show_default=True, help="Jobs of each kind; medians are printed.")
@click.option("--layers", default=16, show_default=True)
@click.option("--length", default=512, show_default=True, help="Tokens of the prompt.")
@click.option("--steps", default=8, show_default=True, help="Tokens to decode after the prompt.")
@click.option("--batch", type=Batches(), default="1", show_default=True)
@click.option("--plot", help="Draw the speed-up against the batch size into this file.")
def main(repeat: int, layers: int, length: int, steps: int, batch: tuple[int, ...], plot: str | None) -> None:
    """Print seconds, tokens/s and the speed-up over one rank."""
    root = Path(tempfile.mkdtemp())
    try:
        source, outs = root / "source", [root / "tp1", root / "tp2"]
        write(source, {**LLAMA_1B, "num_hidden_layers": layers}, filled=True)
        for ranks, out in enumerate(outs, 1):
            convert(source, out, ranks)
            warm(out)
        jobs = [*(Job("reshard", str(out)) for out in outs), Job("transformers", str(outs[1]))]
        arguments = ["--source", str(source), "--no-digests", "--length", str(length), "--steps", str(steps)]
        report = run_jobs(jobs, [*arguments, "--batch", ",".join(map(str, batch)), *map(str, outs)], repeat)
    finally:
        shutil.rmtree(root)
    if plot:
        draw_report(report, plot)
    click.echo(summary(report))


if __name__ == "__main__":
    main()

"""Prefill and decode on CPU: this runtime at tp 1 and tp 2, and transformers' own tensor parallelism, in turn.

    .venv/bin/python scripts/bench_forward.py [--repeat 3] [--layers 16] [--length 512]

One thread a rank, gloo, bf16, a llama of 1B shape with random weights. Prefill is a forward of one prompt that gives
the logits of its last token, decode a step of one token with a cache behind it: `decode` with the logits joined on
every rank, `greedy` through `generate`. Each run is a torchrun job of its own.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path

import click
from bench_common import convert, in_turn, rank_zero
from big_checkpoints import LLAMA_1B, write

WORKER = """
import json, os, sys, time
import torch
import torch.distributed as dist
kind, folder, length, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if kind == "reshard":
    import runtime
    from runtime.generate import greedy
    model = runtime.load(folder, check_digests=False)
else:
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    def greedy(model, ids, count):
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
model.generation_config.eos_token_id = None
ids = torch.arange(length)[None] % 1000
took = {"prefill": [], "decode": [], "greedy": []}
with torch.inference_mode():
    for turn in range(3):
        start = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        took["prefill"].append(time.perf_counter() - start)
        token, cache = ids[:, :1], out.past_key_values
        for step in range(steps):
            start = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            took["decode"].append(time.perf_counter() - start)
    for turn in range(3):
        start = time.perf_counter()
        greedy(model, ids[:, :4], 2)
        middle = time.perf_counter()
        greedy(model, ids[:, :4], 2 + steps)
        took["greedy"].append((time.perf_counter() - 2 * middle + start) / steps)
if os.environ["RANK"] == "0":
    print(json.dumps({name: sorted(times)[len(times) // 2] for name, times in took.items()}), flush=True)
dist.barrier()
os._exit(0)
"""


@click.command()
@click.option("--repeat", default=3, show_default=True, help="Jobs of each kind; medians are printed.")
@click.option("--layers", default=16, show_default=True)
@click.option("--length", default=512, show_default=True, help="Tokens of the prompt.")
@click.option("--steps", default=8, show_default=True, help="Tokens decoded behind it.")
def main(repeat: int, layers: int, length: int, steps: int) -> None:
    """Print seconds, tokens/s and the speed-up over one rank."""
    root = Path(tempfile.mkdtemp())
    try:
        source = root / "source"
        write(source, {**LLAMA_1B, "num_hidden_layers": layers}, filled=True)
        for ranks in (1, 2):
            convert(source, root / f"tp{ranks}", ranks)
        kinds = {
            "reshard tp 1": ("reshard", root / "tp1", 1),
            "reshard tp 2": ("reshard", root / "tp2", 2),
            "transformers tp 2": ("transformers", source, 2),
        }
        jobs = {
            name: partial(rank_zero, WORKER, [kind, str(folder), str(length), str(steps)], ranks)
            for name, (kind, folder, ranks) in kinds.items()
        }
        runs = in_turn(repeat, jobs)
    finally:
        shutil.rmtree(root)
    median = {
        name: {phase: statistics.median(run[phase] for run in found) for phase in found[0]}
        for name, found in runs.items()
    }
    base = median["reshard tp 1"]
    click.echo(f"llama of {layers} layers, bf16, prompt of {length}, medians of {repeat} jobs; beside it × tp 1")
    for name, found in median.items():
        ratio = {phase: base[phase] / found[phase] for phase in found}
        click.echo(
            f"  {name:18} prefill {found['prefill']:6.3f} s ({ratio['prefill']:4.2f} ×)"
            f"   decode {1 / found['decode']:6.2f} tokens/s ({ratio['decode']:4.2f} ×)"
            f"   greedy {1 / found['greedy']:6.2f} tokens/s ({ratio['greedy']:4.2f} ×)"
        )


if __name__ == "__main__":
    main()

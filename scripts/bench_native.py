"""A benchmark of quantized weights on 2 ranks: by their library, dequantised, and not quantized at all.

    .venv/bin/python scripts/bench_native.py [--repeat 3] [--ranks 2] [--layers 8] [--length 128] [--steps 8]

One thread a rank, gloo, a llama of 1B shape in bf16 with nf4 or int8 layers, its files in the page cache; in turn,
medians. Memory is what a rank has more of than before the load, mapped pages among it, after a prefill and the steps
behind it. transformers runs the same checkpoints in one process: it has no tensor parallelism for them.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from bench_common import convert, in_turn, rank_zero, warm
from big_checkpoints import LLAMA_1B, tensors
from safetensors.torch import save_file

WORKER = """
import json, os, sys, time
kind, compute, folder, length, steps = *sys.argv[1:4], *map(int, sys.argv[4:])
import torch, transformers.models.llama.modeling_llama, bitsandbytes, accelerate, transformers.generation.utils
if kind == "ranks":
    import runtime
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS:")) / 1024
before, start = resident(), time.perf_counter()
if kind == "ranks":
    model = runtime.load(folder, compute=compute)
else:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
load = time.perf_counter() - start
ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    model(ids[:, :1])
    times = []
    for _ in range(2):
        start = time.perf_counter()
        output = model(ids, use_cache=True, logits_to_keep=1)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(steps):
        output = model(ids[:, :1], past_key_values=output.past_key_values, use_cache=True)
    decode = (time.perf_counter() - start) / steps
if os.environ["RANK"] == "0":
    print(json.dumps({"load": load, "prefill": min(times), "decode": decode, "memory": resident() - before}))
    sys.stdout.flush()
if torch.distributed.is_initialized():
    torch.distributed.barrier()
os._exit(0)
"""
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    "int8": {"load_in_8bit": True},
}
_ROW = "  {:32} {:>8} {:>10} {:>10} {:>14}"


@click.command()
@click.option("--repeat", default=3, show_default=True)
@click.option("--ranks", default=2, show_default=True)
@click.option("--layers", default=8, show_default=True)
@click.option("--length", default=128, show_default=True, help="Tokens of the prompt.")
@click.option("--steps", default=8, show_default=True, help="Tokens to decode after the prompt.")
def main(repeat: int, ranks: int, layers: int, length: int, steps: int) -> None:
    """Print seconds of the load and of a prefill, tokens/s, and memory."""
    root, arguments = Path(tempfile.mkdtemp()), [str(length), str(steps)]
    try:
        jobs: dict[str, Any] = {}
        for kind in (None, *KINDS):
            name = kind or "bf16"
            source, out = root / name, root / f"{name}-ranks"
            write(source, {**LLAMA_1B, "num_hidden_layers": layers}, kind)
            convert(source, out, ranks)
            warm(source)
            warm(out)
            for compute in ("native", "dequantised") if kind else ("auto",):
                words = ["ranks", compute, str(out), *arguments]
                called = f"{name}, {compute}" if kind else name
                jobs[f"{called}, {ranks} ranks"] = partial(rank_zero, WORKER, words, ranks)
            alone = ["alone", "auto", str(source), *arguments]
            jobs[f"{name}, transformers, one process"] = partial(rank_zero, WORKER, alone, 1)
        click.echo(f"{layers} layers, {length} tokens, medians of {repeat}")
        click.echo(_ROW.format("", "load", "memory", "prefill", "decode"))
        for name, runs in in_turn(repeat, jobs).items():
            found = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
            told = (f"{found['load']:.2f} s", f"{found['memory']:.0f} MiB", f"{found['prefill']:.2f} s")
            click.echo(_ROW.format(name, *told, f"{1 / found['decode']:.1f} tokens/s"))
    finally:
        shutil.rmtree(root)


def write(folder: Path, config: dict[str, Any], kind: str | None) -> None:
    """Write a checkpoint of random numbers, quantized as a kind. All layers have the same matrices: quantizing those
    of one takes some seconds."""
    folder.mkdir()
    told = {"quantization_config": {"quant_method": "bitsandbytes", **KINDS[kind]}} if kind else {}
    (folder / "config.json").write_text(json.dumps({**config, **told}))
    generator, first, found = torch.Generator().manual_seed(0), {}, {}
    for name, shape in tensors(config):
        layer, _, own = name.removeprefix("model.layers.").partition(".")
        alike = own if layer.isdigit() else name
        if alike not in first:
            values = torch.randn(shape, generator=generator, dtype=torch.float32) * 0.02 if len(shape) == 2 else None
            plain = torch.ones(shape, dtype=torch.bfloat16) if values is None else values.bfloat16()
            quantized = layer.isdigit() and values is not None
            first[alike] = _quantized(plain, kind) if quantized and kind else {"": plain}
        for suffix, tensor in first[alike].items():
            found[name.removesuffix(".weight") + suffix if suffix else name] = tensor.clone()
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def _quantized(weight: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

    if kind == "int8":
        codes, scales, _ = int8_vectorwise_quant(weight.half())
        return {".weight": codes, ".SCB": scales}
    data, state = quantize_4bit(weight, blocksize=64, quant_type=kind)
    return {".weight": data, **{f".weight.{name}": value for name, value in state.as_dict(packed=True).items()}}


if __name__ == "__main__":
    main()

"""A benchmark of sequence parallelism: the peak memory of a forward's activations on a rank, and its time.

    .venv/bin/python scripts/bench_sequence.py [--ranks 2] [--layers 2] [--length 1024] [--repeat 3]

On CPU every tensor that an operator returns is counted until nothing refers to it; memory inside an operator is not
seen. On GPUs the peak is the allocator's own. Only the last token's logits are computed, as in `generate`.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import click
from bench_common import convert, in_turn, rank_zero
from big_checkpoints import LLAMA_1B, write

WORKER = """
import json, os, sys, time, weakref
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
import runtime

class Peak(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()
    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known and storage.data_ptr() not in weights:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out

folder, length, split = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "split"
model = runtime.load(folder, sequence_parallel=split)
tensors = [*model.parameters(), *model.buffers()]
tensors = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
weights = {t.untyped_storage().data_ptr() for t in tensors}
ids = torch.arange(length, device=model.device)[None] % 500
call = lambda: model(ids, use_cache=False, logits_to_keep=1)
with torch.inference_mode():
    call()
    dist.barrier()
    start = time.perf_counter()
    call()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        most = torch.cuda.max_memory_allocated() - before
    else:
        with Peak() as peak:
            call()
        most = peak.most
if dist.get_rank() == 0:
    print(json.dumps([most, seconds]))
sys.stdout.flush()
dist.barrier()
os._exit(0)
"""


@click.command()
@click.option("--ranks", default=2, show_default=True)
@click.option("--layers", default=2, show_default=True)
@click.option("--length", default=1024, show_default=True, help="Tokens of the prompt.")
@click.option("--repeat", default=3, show_default=True, help="Runs of each kind; medians are printed.")
def main(ranks: int, layers: int, length: int, repeat: int) -> None:
    """Print MiB and seconds with the sequence whole and split over the ranks."""
    with tempfile.TemporaryDirectory() as root:
        source, out = Path(root, "source"), Path(root, "out")
        write(source, {**LLAMA_1B, "num_hidden_layers": layers}, filled=True)
        convert(source, out, ranks)

        def job(kind: str) -> tuple[float, float]:
            return rank_zero(WORKER, [str(out), str(length), kind], ranks)

        runs = in_turn(repeat, {kind: lambda kind=kind: job(kind) for kind in ("whole", "split")})
    click.echo(f"forward of {length} tokens, {layers} layers, rank 0 of {ranks}; medians of {repeat}")
    for kind, found in runs.items():
        most, seconds = (statistics.median(one) for one in zip(*found))
        click.echo(f"  {kind}  {most / 2**20:7.1f} MiB  {seconds:6.2f} s")


if __name__ == "__main__":
    main()

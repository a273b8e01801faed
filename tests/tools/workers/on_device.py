"""Run under torchrun: everything the runtime does on a device, compared with one process on CPU.

    on_device.py JOB.json OUT.json

The job is {"device", "source", "fp32", "bf16", "quantized", "backend", "compiler"}: a folder of each dtype, the source
and folder of quantized checkpoints by kind, and how to compile. Any difference is an assertion, hence a non-zero exit.
Rank 0 prints each figure at once, and writes them all to OUT.json.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

import runtime
from reshard.errors import UsageError
from reshard.launch.benchmark.measured import Settings
from reshard.resharded.manifest import read_manifest
from runtime.benchmark.engines import Engine
from runtime.benchmark.measure import measure
from runtime.checking.check import check
from runtime.generation.generate import greedy
from runtime.model.placing import owners

IDS = torch.arange(3, 19).repeat(2, 1)
NEW = 6
SLACK = 2 << 20  # bytes: the allocator's rounding, and buffers that no file holds


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.float().cpu(), expected.float().cpu()
    return ((found - expected).abs().max() / expected.abs().max()).item()


class Figures(dict[str, Any]):
    """The figures. Rank 0 prints each at once, so that a job that is stopped has printed those it had."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if dist.get_rank() == 0:
            print(f"  {name}: {value}", flush=True)


def memory(model: Any, folder: str) -> dict[str, int]:
    """Return the bytes of the rank's file. On a GPU, also those allocated and their peak: SLACK more at most."""
    held = read_manifest(Path(folder)).rank_files[dist.get_rank()].size
    found = owners(model)
    local = [getattr(module, own) for module, own in map(found, dict(model.named_parameters()))]
    assert all(tensor.device == model.device for tensor in local)
    assert sum(tensor.nbytes for tensor in local) <= held
    if model.device.type != "cuda":
        return {"file": held}
    allocated, peak = torch.cuda.memory_allocated(model.device), torch.cuda.max_memory_allocated(model.device)
    assert allocated <= held + SLACK, f"{allocated} bytes on the device, of a file of {held}"
    assert peak <= held + SLACK, f"{peak} bytes at the most, of a file of {held}"
    return {"file": held, "allocated": allocated, "peak": peak}


def flash(model: Any) -> float:
    """Return the relative distance of the flash kernel from the plain one. Raises if the kernel cannot run."""
    ids = IDS.to(model.device)
    with torch.inference_mode():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            fast = model(ids, use_cache=False).logits
        with sdpa_kernel(SDPBackend.MATH):
            return relative(fast, model(ids, use_cache=False).logits)


def main(job_path: str, out_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    exact = 1e-5 if job["device"] == "cpu" else 1e-4  # GPU kernels add in another order
    model = runtime.load(job["fp32"], device=job["device"])
    assert dist.get_backend() == job["backend"]
    found = Figures()
    found["device"] = str(model.device)
    found["memory"] = memory(model, job["fp32"])
    if model.device.type == "cuda":
        assert torch.cuda.current_device() == model.device.index
        shared = job["backend"] == "gloo" and dist.get_world_size() > 1
        assert bool(model.generation_config.disable_compile) == shared  # no CUDA graph can hold gloo's collectives
    found["seconds"] = round(sum(model.reshard_seconds.values()), 3)
    ids = IDS.to(model.device)
    single = AutoModelForCausalLM.from_pretrained(job["source"], dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = single(IDS).logits
        found["error"] = relative(model(ids).logits, expected)
        tokens = greedy(model, ids, NEW)
    assert found["error"] <= exact, found
    options = {"max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(tokens.cpu(), single.generate(IDS, attention_mask=torch.ones_like(IDS), **options))
    found["greedy"] = "tokens equal"
    static = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **options)
    assert torch.equal(static, tokens)
    found["static cache"] = "tokens equal"
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=job["compiler"])
        found["compiled"] = relative(compiled(ids, use_cache=False).logits, expected)
    assert found["compiled"] <= exact, found
    parity = check(model, job["source"], per_layer=True)
    assert parity.ok, parity
    assert parity.difference is None, parity
    found["modules"] = "no module differs"
    assert check(model).max_rel <= exact
    with runtime.sdpa("math"):  # not refused: it can compute the folder's attention
        runtime.load(job["fp32"], device=job["device"], attn_implementation="sdpa")
    if model.device.type == "cuda":
        try:
            with runtime.sdpa("flash"):
                runtime.load(job["fp32"], device=job["device"], attn_implementation="sdpa")
            raise AssertionError("flash kernels of a GPU compute no fp32")
        except UsageError:
            pass
    half = runtime.load(job["bf16"], device=job["device"], attn_implementation="sdpa")
    found["flash"] = flash(half)
    assert found["flash"] <= 0.05, found
    for kind, (source, folder) in job["quantized"].items():
        model = runtime.load(folder, device=job["device"])
        parity = check(model, source)
        native = len(model._reshard_quantized.native)
        found[kind] = {"error": parity.max_rel, "limit": parity.tolerance, "native": native}
        assert parity.max_rel <= max(parity.tolerance, exact), parity
        assert native or kind == "fp8"
    engine = Engine("reshard", dist.get_world_size(), partial(runtime.load, job["bf16"], device=job["device"]))
    measured = measure(engine, Settings((1,), 16, 2))
    assert measured.memory > 0
    assert measured.points[0].decode
    found["bench"] = measured.to_json()
    if dist.get_rank() == 0:
        Path(out_path).write_text(json.dumps(found))
    dist.barrier()


main(*sys.argv[1:])
os._exit(0)  # gloo's threads can abort the interpreter while it shuts down, when all is done

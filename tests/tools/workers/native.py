"""Run under torchrun: load folders of quantized checkpoints natively, and write down what the models compute.

    native.py JOBS.json OUT

JOBS is a list of {"name", "folder", "compute", "ids", "new_tokens", "module", "inputs", "compile"}. Rank 0 writes into
the folder OUT, for each job, NAME.pt: logits, logits of the compiled model, greedy tokens, the report of the load,
every parameter and tensor of a file, and what the `module`, which is cut along its inputs, makes of the tensor in the
file `inputs`. OUT/NAME is the saved model.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from compiling import leave_guards_as_they_are

import runtime
from runtime.loading.phases import load_report


def main(jobs: str, out: str) -> None:
    leave_guards_as_they_are()
    for job in json.loads(Path(jobs).read_text()):
        model = runtime.load(job["folder"], compute=job["compute"])
        ids = torch.tensor(job["ids"])
        with torch.inference_mode():
            logits = model(ids).logits
            compiled = (
                torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits if job["compile"] else logits
            )
            made = model.get_submodule(job["module"])(_part(model, job["module"], torch.load(job["inputs"])))
        asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": job["new_tokens"], "do_sample": False}
        tokens = model.generate(ids, **asked)
        names = dict.fromkeys([*model._reshard_targets, *model._reshard_quantized.stored])
        parameters = {name: runtime.full_tensor(model, name).clone() for name in names}
        report = load_report(model)
        model.save_pretrained(Path(out, job["name"]))
        if dist.get_rank() == 0:
            found = {"logits": logits, "compiled": compiled, "tokens": tokens, "parameters": parameters, "made": made}
            torch.save({**found, "report": report}, Path(out, f"{job['name']}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def _part(model, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of the inputs of a module that is cut along them."""
    target = model._reshard_targets[f"{name}.weight"]
    sizes: list = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, model._reshard_quantized.part(target.name).shape[1])
    start = sum(sizes[: dist.get_rank()])
    return inputs[..., start : start + sizes[dist.get_rank()]].contiguous()


main(*sys.argv[1:])
os._exit(0)  # gloo's threads can abort the interpreter while it shuts down, when all is done

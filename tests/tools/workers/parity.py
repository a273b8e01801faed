"""Run under torchrun: load every folder of a list, and write down what the sharded models compute.

    parity.py JOBS.json OUT.json

JOBS is a list of {"name", "folder", "new_tokens"} with either "ids" or "inputs", a file of the forward's arguments, and
perhaps "compute". If "new_tokens" is null, none are generated. "sdpa" may name torch's kernel for attention. After each
job, rank 0 writes OUT: the greedy tokens and the parameters that are no DTensors. The compared output and full tensors
go to OUT.NAME.pt.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from family_inputs import main_output
from torch.distributed.tensor import DTensor

import runtime


def main(jobs_path: str, out_path: str) -> None:
    results = {}
    for job in json.loads(Path(jobs_path).read_text()):
        with runtime.sdpa(job.get("sdpa")):
            run_job(job, results, out_path)
    dist.barrier()
    dist.destroy_process_group()


def run_job(job: dict, results: dict, out_path: str) -> None:
    """Do one job, and write down what came of it."""
    model = runtime.load(job["folder"], compute=job.get("compute", "auto"))
    inputs = {"input_ids": torch.tensor(job["ids"])} if "ids" in job else torch.load(job["inputs"])
    with torch.inference_mode():
        logits = main_output(model(**inputs))
    tokens = None
    if job["new_tokens"]:
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        tokens = model.generate(**inputs, max_new_tokens=job["new_tokens"], do_sample=False).tolist()
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, tokens)
    assert all(one == everyone[0] for one in everyone), "ranks generated different tokens"
    parameters = {name: runtime.full_tensor(model, name).clone() for name in model.state_dict()}
    if dist.get_rank() == 0:
        torch.save({"logits": logits, "parameters": parameters}, f"{out_path}.{job['name']}.pt")
        results[job["name"]] = {
            "tokens": tokens,
            "plain": [n for n, p in model.named_parameters() if not isinstance(p, DTensor)],
        }
        Path(f"{out_path}.part").write_text(json.dumps(results))  # at once: a later job may end us
        os.replace(f"{out_path}.part", out_path)


main(*sys.argv[1:])
os._exit(0)  # gloo's threads can abort the interpreter while it shuts down, when all is done

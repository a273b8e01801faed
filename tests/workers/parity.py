"""Run under torchrun: load every folder of a list, and write down what the sharded models compute.

    parity.py JOBS.json OUT.json

JOBS is a list of {"name", "folder", "ids", "new_tokens"}. Rank 0 writes OUT, after each job: the greedy tokens and the
parameters that are no DTensors; logits and full tensors go to OUT.NAME.pt.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import runtime


def main(jobs_path: str, out_path: str) -> None:
    results = {}
    for job in json.loads(Path(jobs_path).read_text()):
        model = runtime.load(job["folder"])
        ids = torch.tensor(job["ids"])
        with torch.inference_mode():
            logits = model(ids).logits
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=job["new_tokens"], do_sample=False
        )
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, tokens.tolist())
        assert all(one == everyone[0] for one in everyone), "ranks generated different tokens"
        parameters = {name: runtime.full_tensor(model, name).clone() for name in model.state_dict()}
        if dist.get_rank() == 0:
            torch.save({"logits": logits, "parameters": parameters}, f"{out_path}.{job['name']}.pt")
            results[job["name"]] = {
                "tokens": tokens.tolist(),
                "plain": [n for n, p in model.named_parameters() if not isinstance(p, DTensor)],
            }
            Path(out_path).write_text(json.dumps(results))  # at once: a later job may end us
    dist.barrier()
    dist.destroy_process_group()


main(*sys.argv[1:])
os._exit(0)  # gloo's threads can abort the interpreter while it shuts down, when all is done

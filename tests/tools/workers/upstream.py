"""Run under torchrun: run every checkpoint of a list with transformers' own tensor parallelism.

    upstream.py JOBS.json OUT.json

JOBS is a list of {"name", "source", "inputs"}, as for parity.py. Rank 0 writes OUT, after each job: {} or {"error":
words}; the compared output goes to OUT.NAME.pt. A rank that fails leaves the others inside a collective, so the job
ends there: start another with the remaining checkpoints.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from family_inputs import main_output


def run(job: dict) -> torch.Tensor:
    config = transformers.AutoConfig.from_pretrained(job["source"])
    model = getattr(transformers, config.architectures[0]).from_pretrained(job["source"], tp_plan="auto").eval()
    with torch.inference_mode():
        return main_output(model(**torch.load(job["inputs"])))


def main(jobs_path: str, out_path: str) -> None:
    dist.init_process_group("gloo")
    rank, store, results = dist.get_rank(), dist.distributed_c10d._get_default_store(), {}
    for job in json.loads(Path(jobs_path).read_text()):
        words = ""
        try:
            output = run(job)
        except Exception as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
        store.set(f"{job['name']}/{rank}", words)
        everyone = [store.get(f"{job['name']}/{other}").decode() for other in range(dist.get_world_size())]
        failure = next(filter(None, everyone), "")
        if rank == 0:
            results[job["name"]] = {"error": failure} if failure else {}
            if not failure:
                torch.save({"logits": output}, f"{out_path}.{job['name']}.pt")
            Path(f"{out_path}.part").write_text(json.dumps(results))
            os.replace(f"{out_path}.part", out_path)
        if failure:
            return


main(*sys.argv[1:])
os._exit(0)

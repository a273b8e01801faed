"""Run under torchrun: run every checkpoint of a list with transformers' own tensor parallelism.

    upstream.py JOBS.json OUT.json

JOBS is a list of {"name", "source", "inputs"}, as for parity.py, with "tp_plan" if it is not to be "auto", and "dtype"
if not the checkpoint's own. Rank 0 writes OUT, after each job: {} or {"error": words}; the compared output goes to
OUT.NAME.pt. A rank that fails leaves the others inside a collective, so the job ends there: start another with the
remaining checkpoints.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from family_inputs import main_output

PATIENCE = timedelta(seconds=30)  # with ranks that are later than this one


def run(job: dict) -> torch.Tensor:
    config = transformers.AutoConfig.from_pretrained(job["source"])
    options = {"tp_plan": job.get("tp_plan", "auto"), **({"dtype": job["dtype"]} if job.get("dtype") else {})}
    model = getattr(transformers, config.architectures[0]).from_pretrained(job["source"], **options).eval()
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
            print(words, file=sys.stderr, flush=True)
        store.set_timeout(PATIENCE)
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

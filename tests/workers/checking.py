"""Run under torchrun: what `check` says of several folders, one after another.

    checking.py JOBS.json OUT.json

A job is {"name", "folder", "source" or null, "per_layer", "load"}, the last options of `runtime.load`. The
result is what every rank got: they must agree.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

import runtime
from reshard.errors import ReshardError
from runtime.check import check
from runtime.check_text import parity_text


def main(jobs_path: str, out_path: str) -> None:
    results = {}
    for job in json.loads(Path(jobs_path).read_text()):
        model = runtime.load(job["folder"], check_digests=False, **job["load"])
        try:
            parity = check(model, job["source"], per_layer=job["per_layer"])
            found = {**parity.to_json(), "text": parity_text("OUT", parity, per_layer=job["per_layer"])}
        except ReshardError as error:
            found = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        assert all(one == everyone[0] for one in everyone), "ranks came to different results"
        results[job["name"]] = found
    if dist.get_rank() == 0:
        Path(out_path).write_text(json.dumps(results))
    dist.barrier()


main(*sys.argv[1:])
os._exit(0)  # gloo's threads can abort the interpreter while it shuts down, when all is done

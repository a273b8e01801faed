"""Run under torchrun: redistribute every parameter of every folder of a list and back, and save the models.

    round_trips.py JOBS.json OUT

JOBS is a list of {"name", "folder", "source", "saved", "slow"}. The model is saved into "saved", on a slow disk if
"slow". Rank R writes OUT.R: for each name, the kinds of placements met, and how the calls that must fail did so. A
tensor that differs from the single-process model of "source" is an assertion.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import AutoModelForCausalLM

import runtime
from reshard.errors import ReshardError


def there_and_back(tensor: DTensor, whole: torch.Tensor) -> None:
    """Redistribute to every other plain placement, and back."""
    assert torch.equal(tensor.full_tensor(), whole)
    axes = tensor.device_mesh.ndim
    for one in (Replicate(), *(Shard(dim) for dim in range(tensor.ndim))):
        other = tensor.redistribute(placements=[one, *[Replicate()] * (axes - 1)])
        assert torch.equal(other.full_tensor(), whole), (tensor.placements, one)
        strided = [placement for placement in tensor.placements if isinstance(placement, _StridedShard)]
        if axes == 2 and strided and one == Shard(strided[0].dim):  # torch 2.13 gets the way back wrong
            other = other.redistribute(placements=[Replicate()] * axes)
        back = other.redistribute(placements=tensor.placements)
        assert torch.equal(back.to_local(), tensor.to_local()), (tensor.placements, one)


def refused(call: Any, *arguments: Any, **options: Any) -> str:
    try:
        call(*arguments, **options)
    except ReshardError as error:
        return f"{type(error).__name__} {error.message}"
    return "nothing"


@contextmanager
def slow_disk() -> Iterator[None]:
    """Make a sync take longer than a collective waits."""
    real, limit = os.fsync, 4

    def slowly(fd: int) -> None:
        time.sleep(1.5 * limit)
        os.fsync = real
        real(fd)

    for seconds in (limit, 600):
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
        if seconds == limit:
            os.fsync = slowly
            yield
            os.fsync = real


def trip(job: dict[str, Any]) -> dict[str, Any]:
    model = runtime.load(job["folder"])
    expected = AutoModelForCausalLM.from_pretrained(job["source"]).state_dict()
    kinds = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(runtime.full_tensor(model, name), expected[name]), name
        if isinstance(parameter, DTensor):
            if ".layers.1." not in name:  # it is as layer 0
                there_and_back(parameter, expected[name])
            kinds.add(" ".join(type(placement).__name__ for placement in parameter.placements))
        else:
            kinds.add("local")
    first = dist.get_rank() == 0
    options = {"safe_serialization": True, "push_to_hub": False, "is_main_process": first}
    with slow_disk() if job["slow"] else nullcontext():
        model.save_pretrained(job["saved"], max_shard_size=50_000, **options)
    failures = {"again": refused(model.save_pretrained, job["saved"])}
    failures["argument"] = refused(model.save_pretrained, f"{job['saved']}-2", state_dict={})
    failures["nobody writes"] = refused(model.save_pretrained, f"{job['saved']}-2", is_main_process=False)
    failures["no such name"] = refused(runtime.full_tensor, model, "lm_haed.weight")
    failures["full disk"] = refused(model.save_pretrained, "/proc/nowhere")
    return {"kinds": sorted(kinds), **failures}


def main(jobs: str, out: str) -> None:
    torch.save({job["name"]: trip(job) for job in json.loads(Path(jobs).read_text())}, f"{out}.{dist.get_rank()}")
    dist.barrier()


main(*sys.argv[1:])
os._exit(0)  # gloo's threads can abort the interpreter while it shuts down, when all is done

"""Run under torchrun: `check` of several folders, one after another.

    checking.py JOBS.json OUT.json

A job is {"name", "folder", "source" or null, "per_layer", "where" or null, "load"}: `load` are options of
`runtime.load`, `where` is one of CONDITIONS. The result is the same on every rank: they must agree.
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
from unittest import mock

import torch
import torch.distributed as dist

import runtime
from reshard.errors import ReshardError
from runtime.checking.check import check
from runtime.checking.text import parity_text

CHECK = sys.modules["runtime.checking.check"]
SINGLE = sys.modules["runtime.checking.single"]
LIMIT = 4  # seconds that a collective waits


def hungry(*_: Any, **_options: Any) -> Any:
    return torch.empty(1 << 60, dtype=torch.uint8)


@contextmanager
def slow() -> Iterator[None]:
    real = SINGLE.single_model

    def slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(1.5 * LIMIT)
        return real(*arguments, **options)

    with short_collectives(LIMIT), mock.patch.object(SINGLE, "single_model", slowly):
        yield


@contextmanager
def short_collectives(seconds: float) -> Iterator[None]:
    for limit in (seconds, 600):
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=limit), group)
        if limit == seconds:
            yield


CONDITIONS: dict[str | None, Any] = {
    None: nullcontext,
    "one process is slow": slow,
    "no memory to load": lambda: mock.patch("transformers.LlamaForCausalLM.from_pretrained", hungry),
    "no memory to run": lambda: mock.patch.object(CHECK, "reference_of", hungry),
    "another device": lambda: mock.patch.object(CHECK, "STORED_ON", "cuda"),
}


def main(jobs_path: str, out_path: str) -> None:
    results = {}
    for job in json.loads(Path(jobs_path).read_text()):
        model = runtime.load(job["folder"], check_digests=False, **job["load"])
        try:
            with CONDITIONS[job["where"]]():
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

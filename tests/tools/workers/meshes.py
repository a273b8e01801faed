"""Run under torchrun on four ranks: load folders on meshes of several shapes, and write down how it went.

    meshes.py FOLDERS.json OUT

FOLDERS are paths by name: tp1, tp2, tp4, heads (ranks share a KV head), experts (tp 2 × ep 2), damaged (tp2 with one
byte of its second file changed) and configured (tp2 with its config.json changed). Rank R writes OUT.R: {case: result}.
A result is the logits of IDS, the replica, the items it took and the gathered ones; or the error's type and words.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import runtime
from reshard.errors import ReshardError

IDS = torch.arange(3, 12).repeat(2, 1)
ITEMS = ["a", "b", "c", "d", "e"]


def attempt(folder: str, mesh: DeviceMesh | None = None, **options: Any) -> dict[str, Any]:
    try:
        model = runtime.load(folder, mesh, timeout=60, **options)
    except ReshardError as error:
        return {"error": type(error).__name__, "words": error.message, "hint": error.hint}
    with torch.inference_mode():
        logits = model(IDS).logits
    replicas = model._reshard_replicas
    taken = runtime.share(model, ITEMS)
    gathered = runtime.gather(model, [item.upper() for item in taken])
    name = "model.layers.0.self_attn.k_proj.weight"
    whole = runtime.full_tensor(model, name).clone()
    assert torch.equal(dict(model.named_parameters())[name].full_tensor(), whole)
    found = {"logits": logits, "replica": (replicas.index, replicas.count), "taken": taken, "gathered": gathered}
    return {**found, "whole": whole, "mesh": tuple(model._device_mesh.mesh.tolist())}


def named(shape: tuple[int, ...], *names: str) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names or None)


def main(folders: str, out: str) -> None:
    at = json.loads(Path(folders).read_text())
    rank = int(os.environ["RANK"])
    results = {"made here": attempt(at["tp2"], dp_size=2)}  # makes the process group too
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "dp tp": lambda: attempt(at["tp2"], named((2, 2), "dp", "tp")),
        "pp dp tp": lambda: attempt(at["tp2"], named((1, 2, 2), "pp", "dp", "tp")),
        "tp pp": lambda: attempt(at["tp2"], named((2, 2), "tp", "pp")),
        "its tp alone": lambda: attempt(at["tp2"], named((2, 2), "dp", "tp")["tp"]),
        "shared heads": lambda: attempt(at["heads"], named((2, 2), "dp", "tp")),
        "experts": lambda: attempt(at["experts"], named((2, 2), "dp", "tp")),
        "split sequence": lambda: attempt(at["tp2"], named((2, 2), "dp", "tp"), sequence_parallel=True),
        "no names": lambda: attempt(at["tp2"], named((2, 2))),
        "no tp": lambda: attempt(at["tp2"], named((2, 2), "dp", "model")),
        "another size": lambda: attempt(at["tp4"], named((2, 2), "dp", "tp")),
        "with replicas": lambda: attempt(at["tp2"], named((2, 2), "dp", "tp"), dp_size=2),
        "another device": lambda: attempt(at["tp2"], named((2, 2), "dp", "tp"), device="cuda:0"),
        "its device": lambda: attempt(at["tp2"], named((2, 2), "dp", "tp"), device="cpu"),
        "another configuration": lambda: attempt(at["configured"], named((2, 2), "dp", "tp")),
        "uneven replicas": lambda: attempt(at["tp2"], dp_size=3),
        "damaged on one rank": lambda: attempt(at["damaged" if rank == 3 else "tp2"], named((2, 2), "dp", "tp")),
        "two of four": lambda: attempt(at["tp1"], DeviceMesh("cpu", [[1], [3]], mesh_dim_names=("dp", "tp"))),
    }
    for name, case in cases.items():
        results[name] = case()
        dist.barrier()
    torch.save(results, f"{out}.{rank}")
    dist.barrier()


main(*sys.argv[1:])
os._exit(0)  # gloo's threads can abort the interpreter while it shuts down, when all is done

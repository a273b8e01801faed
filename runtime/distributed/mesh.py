"""The ranks' store, and the device mesh over them."""

from __future__ import annotations

import atexit
import os
import threading
import time
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from reshard.errors import TopologyError, UsageError
from reshard.text import printable

from .agreement import Deadline, UnansweredError, first_line
from .ranks import RankInfo
from .replicas import TP

__all__ = ["backend_of", "connect", "make_mesh", "pick_device", "shut_down"]

_GLOO_LETS_GO = 0.2  # seconds
_TORCH_SAYS_WHY = 1.0  # seconds after the deadline: torch often keeps the deadline itself, and knows the reason
_COLLECTIVES = timedelta(minutes=10)  # a collective's limit once the model is loaded
_NO_STORE = (
    "torchrun has ended, or something else uses the port: give another as MASTER_PORT, or to torchrun as --master-port"
)
_store: dist.Store | None = None


def pick_device(wanted: str | None, local_rank: int) -> torch.device:
    """Return the wanted device, `cuda:LOCAL_RANK` for `cuda`. The default is `cuda` if there are GPUs, else `cpu`.

    Raises:
        UsageError: `wanted` is no device, or neither a CPU nor a CUDA device.
        TopologyError: the device is absent.
    """
    hint = "use --device cpu, cuda or cuda:0"
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UsageError(f"{printable(wanted)} is not a device", hint=hint) from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"models are not loaded on {device.type}", hint=hint)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise TopologyError("no CUDA device is available", hint="use --device cpu")
    count = torch.cuda.device_count()
    if device.index is None and local_rank >= count:
        raise TopologyError(
            f"local rank {local_rank} has no GPU of its own: this machine has {count}",
            hint="--device cuda:0 has all ranks share one",
        )
    if device.index is not None and device.index >= count:
        raise TopologyError(f"there is no {device}: this machine has {count} GPUs")
    return torch.device("cuda", local_rank if device.index is None else device.index)


def backend_of(wanted: str | None, device: torch.device, world_size: int) -> str:
    """Return nccl for GPUs and gloo for CPU. If all ranks share a GPU, wanted by its number, it is gloo: NCCL refuses
    two ranks on one GPU."""
    shared = wanted is not None and torch.device(wanted).index is not None and world_size > 1
    return "nccl" if device.type == "cuda" and not shared else "gloo"


def connect(info: RankInfo, deadline: Deadline) -> dist.Store:
    """Return the store that the ranks share: the process group's if there is one, else torchrun's."""
    global _store
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if info.world_size == 1:
        return dist.HashStore()
    if _store is None:
        try:
            store = _meet(info, deadline)
        except (ValueError, RuntimeError) as error:  # DistNetworkError and DistStoreError are RuntimeErrors
            raise TopologyError(
                f"rank {info.rank} cannot reach the others: {first_line(error)}",
                hint=_NO_STORE if isinstance(error, dist.DistError) else None,
            ) from None
        _store = dist.PrefixStore(f"attempt {info.attempt}", store)  # an earlier attempt has left its failure there
    return _store


def _meet(info: RankInfo, deadline: Deadline) -> dist.Store:
    """Meet the other ranks with torch's rendezvous, on a thread that is left behind after the deadline: torch waits for
    ever for an answer from any process that listens on the port."""
    found: Future[dist.Store] = Future()

    def meet() -> None:
        try:
            store, _, _ = next(dist.rendezvous("env://", info.rank, info.world_size, timeout=deadline.left()))
            found.set_result(store)
        except BaseException as error:
            found.set_exception(error)

    thread = threading.Thread(target=meet, name="rendezvous", daemon=True)
    thread.start()
    thread.join(max(0, deadline.seconds()))
    thread.join(_TORCH_SAYS_WHY)  # also if the process was stopped until after the deadline
    if found.done():
        return found.result()
    at = printable(f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}")
    raise TopologyError(
        f"rank {info.rank} cannot reach the others: none of them answers at {at}",
        hint=_NO_STORE,
    )


def make_mesh(
    info: RankInfo, device: torch.device, store: dist.Store, deadline: Deadline, *, backend: str, replicas: int = 1
) -> DeviceMesh:
    """Make a mesh over all ranks with axis `tp`, after an axis `dp` if there are replicas; collectives are `backend`'s.

    The deadline is for the ranks to find each other; later collectives have their own, longer limit.

    Raises:
        UnansweredError: the ranks did not find each other in time.
        TopologyError: this rank could not join, for a reason of its own.
    """
    made = not dist.is_initialized()
    options: dict[str, Any] = {}
    if made and device.type == "cuda" and backend == "nccl":
        options["device_id"] = device
    try:
        if made:
            store.set_timeout(deadline.left())
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", store),
                rank=info.rank,
                world_size=info.world_size,
                timeout=deadline.left(),
                **options,
            )
        size = info.world_size // replicas
        axes = {"dp": replicas, TP: size} if replicas > 1 else {TP: size}
        mesh = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    except RuntimeError as error:
        waited = deadline.seconds() <= 0
        raise (UnansweredError if waited else TopologyError)(f"cannot join the others: {first_line(error)}") from None
    if made:
        atexit.register(_leave)
        store.set_timeout(_COLLECTIVES)
        for group in {dist.group.WORLD, *mesh.get_all_groups()}:
            dist.distributed_c10d._set_pg_timeout(_COLLECTIVES, group)
    return mesh


def _leave() -> None:
    """At exit, leave the group we made, and wait until gloo's threads release the last tensors: a thread that does so
    while the interpreter shuts down aborts the process ("terminate called without an active exception")."""
    shut_down()
    time.sleep(_GLOO_LETS_GO)


def shut_down() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()

"""From torchrun's environment to a device mesh. Ranks agree through the store before any collective exists."""

from __future__ import annotations

import atexit
import itertools
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from reshard import errors
from reshard.errors import RemoteMovedError, ReshardError, TopologyError, UsageError, printable

__all__ = ["RankInfo", "agree", "connect", "make_mesh", "pick_device", "shut_down"]

_GLOO_LETS_GO = 0.2  # seconds
_meetings = itertools.count()


@dataclass(frozen=True, slots=True)
class RankInfo:
    """This process's place among the ranks, as torchrun tells it. `local` ranks are those of the same machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int = 1

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> RankInfo:
        """Without torchrun: the only rank of one. Raises UsageError where the variables are half set or no numbers."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        present = [name for name in names if name in environ]
        if not present:
            return cls(0, 1, 0)
        try:
            rank, world_size, local_rank = (int(environ[name]) for name in names)
            return cls(rank, world_size, local_rank, max(1, int(environ.get("LOCAL_WORLD_SIZE", 1))))
        except KeyError as missing:
            raise UsageError(
                f"{missing.args[0]} is not set, though {present[0]} is", hint="start with torchrun"
            ) from None
        except ValueError:
            raise UsageError(f"{', '.join(names)} must be numbers", hint="start with torchrun") from None


def pick_device(wanted: str | None, local_rank: int) -> torch.device:
    """`cuda:LOCAL_RANK` where there are GPUs, unless the user wants another. Raises TopologyError if it is absent."""
    kind = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind != "cuda":
        return torch.device(kind)
    if not torch.cuda.is_available():
        raise TopologyError("no CUDA device is available", hint="use --device cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise TopologyError(f"local rank {local_rank} has no GPU of its own: this machine has {count}")
    return torch.device("cuda", local_rank)


def connect(info: RankInfo, timeout: timedelta) -> dist.Store:
    """The store the ranks share: the process group's where there is one, else torchrun's."""
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if info.world_size == 1:
        return dist.HashStore()
    try:
        store, _, _ = next(dist.rendezvous("env://", info.rank, info.world_size, timeout=timeout))
    except (ValueError, RuntimeError) as error:  # DistNetworkError and DistStoreError are RuntimeErrors
        raise TopologyError(f"rank {info.rank} cannot reach the others: {printable(error)}") from None
    return store


def agree(
    store: dist.Store, info: RankInfo, failure: Exception | None, timeout: timedelta, *, what: str, value: str = ""
) -> None:
    """Tell the other ranks how `what` went here, and learn how it went there. No collective is used.

    `value` is what all must have in common, such as the digest of the manifest they read.

    Raises:
        ReshardError: the failure of the first rank that has one, the same on every rank; on that rank it is `failure`.
        RemoteMovedError: the ranks' values differ.
        TopologyError: a rank did not answer in time; it is named.
    """
    meeting = dist.PrefixStore(f"reshard/{next(_meetings)}", store)
    status = {"failure": failure and _words(failure), "value": value}
    keys = [str(rank) for rank in range(info.world_size)]
    try:
        meeting.set(keys[info.rank], json.dumps(status))
        meeting.wait(keys, timeout)
    except RuntimeError as error:
        if failure is not None:
            raise failure from None
        missing = [key for key in keys if not meeting.check([key])]
        raise TopologyError(f"{what}: no answer from rank {', '.join(missing) or '?'}: {printable(error)}") from None
    answers = [json.loads(meeting.get(key)) for key in keys]
    for rank, answer in enumerate(answers):
        if failure is not None and rank == info.rank:
            raise failure
        if answer["failure"] is not None:
            name, message, hint = answer["failure"]
            prefix = "" if rank == 0 else f"rank {rank}: "
            raise getattr(errors, name, ReshardError)(prefix + message, hint=hint)
        if answer["value"] != answers[0]["value"]:
            raise RemoteMovedError(
                f"{what}: rank {rank} has another version than rank 0", hint="pin one with --revision COMMIT"
            )


def _words(failure: Exception) -> list[str | None]:
    if isinstance(failure, ReshardError):
        return [type(failure).__name__, failure.message, failure.hint]
    return ["ReshardError", f"unexpected {type(failure).__name__}: {printable(failure)}", None]


def make_mesh(info: RankInfo, device: torch.device, store: dist.Store, timeout: timedelta) -> DeviceMesh:
    """A one-dimensional mesh, axis `tp`, over all ranks: NCCL on CUDA, gloo on CPU."""
    if not dist.is_initialized():
        options: dict[str, Any] = {}
        if device.type == "cuda":
            torch.cuda.set_device(device)
            options["device_id"] = device
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=info.rank,
            world_size=info.world_size,
            timeout=timeout,
            **options,
        )
        atexit.register(_leave)
    return init_device_mesh(device.type, (info.world_size,), mesh_dim_names=("tp",))


def _leave() -> None:
    """At exit, leave the group we made, and let gloo's threads let go of the last tensors: one that does so while the
    interpreter shuts down aborts the process ("terminate called without an active exception")."""
    shut_down()
    time.sleep(_GLOO_LETS_GO)


def shut_down() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def this_rank() -> RankInfo:
    """`RankInfo` of this process, from the process group where there is one."""
    info = RankInfo.from_env(os.environ)
    if dist.is_initialized():
        return replace(info, rank=dist.get_rank(), world_size=dist.get_world_size())
    return info

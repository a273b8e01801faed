"""This process's place among the ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch.distributed as dist

from reshard.errors import UsageError

__all__ = ["RankInfo", "this_rank"]


@dataclass(frozen=True, slots=True)
class RankInfo:
    """This process's place among the ranks, as torchrun tells it. `local` counts the ranks of the same machine.

    `attempt` counts torchrun's restarts, which share a store; None if torchrun did not start this process.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int = 1
    attempt: int | None = None

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> RankInfo:
        """Read torchrun's variables; without them, one rank. Raises UsageError if some are missing or no numbers."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        present = [name for name in names if name in environ]
        if not present:
            return cls(0, 1, 0)
        try:
            rank, world_size, local_rank = (int(environ[name]) for name in names)
            local_world_size = max(1, int(environ.get("LOCAL_WORLD_SIZE", 1)))
            attempt = int(environ.get("TORCHELASTIC_RESTART_COUNT", 0)) if "TORCHELASTIC_RUN_ID" in environ else None
        except KeyError as missing:
            raise UsageError(
                f"{missing.args[0]} is not set, though {present[0]} is", hint="start with torchrun"
            ) from None
        except ValueError:
            raise UsageError(f"{', '.join(names)} must be numbers", hint="start with torchrun") from None
        return cls(rank, world_size, local_rank, local_world_size, attempt)


def this_rank() -> RankInfo:
    """Return the `RankInfo` of this process, from the process group if there is one."""
    info = RankInfo.from_env(os.environ)
    if dist.is_initialized():
        return replace(info, rank=dist.get_rank(), world_size=dist.get_world_size())
    return info

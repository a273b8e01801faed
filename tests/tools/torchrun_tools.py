"""Starters of jobs of several ranks on this machine."""

from __future__ import annotations

import os
import subprocess
import sys

import warm_commands
import warm_ranks


def on_ranks(world_size: int, *arguments: str, timeout: float = 600) -> warm_ranks.Done:
    """Run `python ARGUMENTS` on every rank, as torchrun does, but started within milliseconds (see `warm_ranks`)."""
    return warm_ranks.run(world_size, *arguments, timeout=timeout)


def torchrun(
    world_size: int, *arguments: str, warm: bool = False, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run `torchrun ARGUMENTS` in fresh processes, or in forked ones for tests of what the launcher says."""
    command = [
        warm_commands.python() if warm else sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world_size),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )

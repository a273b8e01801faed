"""Parts that the benchmarks share: torchrun jobs, runs in turn, and one state of memory for all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reshard.launch.benchmark.runs import in_turn

__all__ = ["convert", "in_turn", "rank_zero", "same_memory", "torchrun", "warm"]


def same_memory(rest: float) -> None:
    """Let everything written before reach the disk, then wait `rest` seconds.

    A virtual machine gives freed memory back to its host within seconds (free page reporting), and getting it again
    costs more than a copy does. Without the wait, a command that writes at once finds the memory of the output deleted
    before it, and one that plans first does not.
    """
    os.sync()
    time.sleep(rest)


def warm(folder: Path) -> None:
    """Read every file of a folder once, so that it is in the page cache."""
    for path in folder.iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.read(16 << 20):
                pass


def convert(source: Path, out: Path, ranks: int) -> None:
    """Run `reshard convert`, quietly."""
    command = [sys.executable, "-P", "-m", "reshard", "convert", str(source), str(out), "--tp-size", str(ranks)]
    subprocess.run([*command, "--no-sync"], check=True, stdout=subprocess.DEVNULL)


def torchrun(ranks: int) -> list[str]:
    """Return the beginning of a torchrun command line."""
    return [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def rank_zero(script: str, arguments: Sequence[str], ranks: int) -> Any:
    """Run a script under torchrun, one thread a rank. Returns the JSON that rank 0 printed last."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(script)
        file.flush()
        done = subprocess.run(
            [*torchrun(ranks), file.name, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])

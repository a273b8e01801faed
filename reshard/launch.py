"""Start torchrun's own agent with one process for each rank of a folder."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from .inspection import inspect

__all__ = ["launch"]


def launch(out: str, arguments: Sequence[str]) -> int:
    """Run `python -m runtime ARGUMENTS` on every rank, on this machine. Returns the exit code of the first to fail."""
    world_size = inspect(out).world_size
    # Each process gets its share of the CPUs, unless the caller decided.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the rank has said it in one line
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "runtime", *arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0

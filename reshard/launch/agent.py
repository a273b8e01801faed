"""The launcher: torchrun's own agent, with one process for each rank."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence

from ..errors import TopologyError
from .current_folder import check_runtime, keep_children_out

__all__ = ["launch"]

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `reshard-rank ARGUMENTS` as `processes` ranks on this machine. Returns the exit code of the first to fail.

    The ranks share this process's stdin, stdout and stderr; only rank 0 reads.

    Raises:
        TopologyError: a rank was killed, so it could not say what was wrong.
        UsageError: `import runtime` would find another module.
    """
    check_runtime()
    keep_children_out()
    # Each process gets its share of the CPUs, unless the caller set this.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its socket warnings come with C++ stacks

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        max_restarts=0,
    )
    try:
        with _process_as_it_was():
            elastic_launch(config, sys.executable)("-P", "-m", "reshard.launch.rank", *arguments)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode > 0:
            return first.exitcode
        name = signal.Signals(-first.exitcode).name
        hint = "the system does this when memory runs out" if name == "SIGKILL" else None
        raise TopologyError(f"rank {rank} was ended by {name}", hint=hint) from None
    except SignalException as stopped:
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        return 128 + stopped.sigval
    return 0


@contextlib.contextmanager
def _process_as_it_was() -> Iterator[None]:
    """Silence the agent's logs, since the rank has said it in one line, and restore the signal handlers it replaces."""
    # Only the main thread may have handlers, and torch sets none from another.
    ours = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in _HANDLED if ours}
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)
        for number, handler in handlers.items():
            signal.signal(number, handler)

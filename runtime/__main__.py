"""The command line of a rank: `generate`, `check` and `bench`. One rank prints; the others are quiet."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
import traceback
import warnings
from typing import Any

import click

from reshard.errors import ReshardError
from reshard.launch.current_folder import leave
from reshard.launch.failures import report_failure, wants_json, wants_traceback
from reshard.launch.switches import Commands, in_colour
from reshard.process import end_on_interrupt, quiet_imports

from .commands.bench import bench
from .commands.check import check
from .commands.generate import generate
from .commands.options import is_first
from .distributed.agreement import Deadline
from .distributed.mesh import connect, shut_down
from .distributed.ranks import this_rank

_TO_SPEAK = 1.0  # seconds to reach the store, which tells which rank reports a failure
_TO_END = 0.5  # seconds from when a process closes its sockets until it has ended
_PARENT = os.getppid()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Run a resharded folder. Start one process for each rank with torchrun."""


cli.add_command(generate)
cli.add_command(check)
cli.add_command(bench)


def _fail(error: BaseException) -> int:
    """Report a failure, unless another rank reports it. Return the exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, once another rank has ended
    verbose = wants_traceback(sys.argv)
    if _speaks_first():
        return report_failure(error, verbose=verbose, as_json=wants_json(sys.argv))
    if verbose:
        traceback.print_exception(error)
    with contextlib.redirect_stderr(io.StringIO()):
        return report_failure(error, verbose=False)


def _speaks_first() -> bool:
    """Whether this rank is the first to ask the store. Without a store: rank 0, or a rank that is cut off by itself."""
    try:
        info = this_rank()
    except ReshardError:
        return True
    try:
        return connect(info, Deadline.after(_TO_SPEAK)).add("reshard/spoken", 1) == 1
    except (ReshardError, RuntimeError):
        if info.rank != 0:
            time.sleep(_TO_END)
        return info.rank == 0 or os.getppid() == _PARENT  # torchrun, which holds the store, still runs


def entry(name: str = "reshard-rank") -> None:
    """Run a command on this rank, in a process called `name`. One rank reports a failure, however many have it."""
    leave()
    quiet_imports()
    if not (wants_traceback(sys.argv) and is_first()):
        warnings.simplefilter("ignore")  # they advise authors of torch code
    end_on_interrupt()
    code: Any = 0
    try:
        # A command's exit code, if it returns one.
        code = cli.main(prog_name=name, standalone_mode=False, color=in_colour()) or 0
        shut_down()
    except SystemExit:  # click's, if the reader of stdout has gone: no rank reports that
        _speaks_first()
        code = 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        code = _fail(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: gloo's threads can abort the interpreter while it shuts down, and the work would count as failed.
    # After a failure the group is not destroyed: that would wait for the other ranks.
    os._exit(code)


if __name__ == "__main__":
    entry("python -m runtime")

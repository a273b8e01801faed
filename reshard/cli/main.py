"""The group of all commands, and `main`, where every failure becomes its line and exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any

import click

from .._version import __version__
from ..errors import StorageError
from ..launch.current_folder import leave
from ..launch.failures import Terminated, report_failure, terminate, wants_json, wants_traceback
from ..launch.switches import Commands, in_colour
from ..process import patient_from_now_on, quiet_imports
from .bench import bench
from .check import check
from .convert import convert
from .env import env
from .export import export
from .finish import finish
from .inspect import inspect
from .merge import merge
from .plan import plan
from .publish import publish
from .pull import pull
from .run import run
from .verify import verify

__all__ = ["cli", "entry", "main"]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="reshard")
def cli() -> None:
    """Reshard a Hub checkpoint once, offline, into one safetensors file per tensor-parallel rank.

    \b
    reshard convert org/model model-tp2 --tp-size 2
    reshard run model-tp2 --prompt "Hello"
    """


for _command in (convert, finish, plan, inspect, verify, merge, export, run, check, bench, publish, pull, env):
    cli.add_command(_command)


def main(arguments: list[str] | None = None, *, command: click.Command = cli) -> None:
    """Run the command line, and turn every failure into its line and exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, terminate)
    try:
        code = command.main(
            arguments, standalone_mode=False, color=in_colour()
        )  # the command's exit code, if it has one
    except Exception as error:
        sys.exit(report_failure(error, verbose=wants_traceback(arguments), as_json=wants_json(arguments)))
    except (KeyboardInterrupt, Terminated) as error:
        sys.exit(report_failure(error, verbose=False, as_json=wants_json(arguments)))
    if code:
        sys.exit(code)


def entry() -> None:
    """Run the `reshard` command as a process, which ends at once when the command does.

    Without that, Python would take a second to tear down the modules of torch and transformers.
    """
    leave()
    quiet_imports()
    patient_from_now_on()
    try:
        main()
        code: Any = 0
    except SystemExit as ended:
        code = ended.code
    try:
        sys.stdout.flush()
    except OSError as error:  # the result was not printed: the reader has gone, or the disk is full
        lost = StorageError(f"output: {error.strerror}")
        gone = isinstance(error, BrokenPipeError)
        code = 128 + signal.SIGPIPE if gone else report_failure(lost, verbose=False, as_json=wants_json(sys.argv))
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code or 0)

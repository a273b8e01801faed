"""Failures as a line on stderr and an exit code, the same for the command line and for a rank.

With `--format json` the line is an object: `error` and `hint` are texts, `exit_code` is a number, and `kind` is the
name of the Python exception, such as `DestinationExistsError`. It goes to stderr too: stdout holds only results.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import traceback
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import click

from ..errors import ReshardError
from ..files.system import explained
from ..text import printable
from .switches import in_colour

__all__ = ["Terminated", "json_text", "report_failure", "terminate", "wants_json", "wants_traceback"]


class Terminated(BaseException):
    """SIGTERM, as an exception."""


def wants_traceback(arguments: Sequence[str]) -> bool:
    """Whether `--verbose` is among the arguments, before they are parsed: parsing can be what fails."""
    return any(re.fullmatch("--verbose|-q*v[qv]*", argument) for argument in arguments)


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether `--format json` is among the arguments, before they are parsed."""
    return "--format=json" in arguments or ("--format", "json") in pairwise(arguments)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return JSON that is safe to show: every character that moves a cursor is escaped."""
    return json.dumps(value, indent=indent).replace("\x7f", "\\u007f")  # json lets this one through


def report_failure(error: BaseException, *, verbose: bool, as_json: bool = False) -> int:
    """Print what went wrong in one line, and the hint, if there is one, in another. Returns the exit code."""
    if verbose and not isinstance(error, click.exceptions.Exit):
        traceback.print_exception(error)
    message, hint, code, kind = _told(explained(error))
    with contextlib.suppress(OSError):  # stderr can be a file on a full disk
        if as_json:
            click.echo(json_text({"error": message, "hint": hint, "exit_code": code, "kind": kind}), err=True)
        elif isinstance(error, click.ClickException):
            error.show()  # with the usage
        else:
            # In one piece: other processes may write to the same stderr.
            click.echo(click.style("Error: ", fg="red") + message, err=True, color=in_colour())
            if hint:
                click.secho(f"Hint: {hint}", dim=True, err=True, color=in_colour())
    return code


def _told(error: BaseException) -> tuple[str, str | None, int, str]:
    """Return the line, the hint, the exit code and the kind of a failure."""
    if isinstance(error, ReshardError):
        return error.message, error.hint, error.exit_code, type(error).__name__
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hint = f"{context.command_path} --help" if context else None
        return error.format_message(), hint, error.exit_code, "UsageError" if error.exit_code == 2 else "ReshardError"
    if isinstance(error, (KeyboardInterrupt, click.Abort, Terminated)):
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        hint = getattr(error, "hint", None) or getattr(error.__context__, "hint", None)  # click wraps Ctrl-C in Abort
        return "interrupted", hint, 128 + number, "KeyboardInterrupt"
    kind = type(error).__name__
    return f"unexpected {kind}: {printable(error)}", "-v shows the traceback", 1, kind


def terminate(*_: object) -> None:
    """Handle SIGTERM."""
    raise Terminated  # unwinds, so that nothing half-written stays

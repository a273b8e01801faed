"""Every failure as its line on stderr and its exit code: the same words for the command line and for a rank."""

from __future__ import annotations

import contextlib
import signal
import traceback
from collections.abc import Sequence

import click

from .errors import ReshardError, printable

__all__ = ["Terminated", "report_failure", "terminate", "wants_traceback"]


class Terminated(BaseException):
    """SIGTERM, as an exception."""


def wants_traceback(arguments: Sequence[str]) -> bool:
    """Whether `--verbose` is among the arguments: asked before they are parsed, since parsing can be what fails."""
    return not {"-v", "--verbose"}.isdisjoint(arguments)


def report_failure(error: BaseException, *, verbose: bool) -> int:
    """Say what went wrong in one line, with a hint in another where there is one. Returns the exit code."""
    if verbose and not isinstance(error, click.exceptions.Exit):
        traceback.print_exception(error)
    if isinstance(error, ReshardError):
        with contextlib.suppress(OSError):  # stderr can be a file on the disk that is full
            _say_error(error.message)
            if error.hint:
                click.secho(f"Hint: {error.hint}", dim=True, err=True)
        return error.exit_code
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, (KeyboardInterrupt, click.Abort, Terminated)):
        click.echo("Error: interrupted", err=True)
        hint = getattr(error, "hint", None) or getattr(error.__context__, "hint", None)  # click wraps Ctrl-C in Abort
        if hint:
            click.secho(f"Hint: {hint}", dim=True, err=True)
        return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
    _say_error(f"unexpected {type(error).__name__}: {printable(error)}")
    click.secho("Hint: -v shows the traceback", dim=True, err=True)
    return 1


def _say_error(message: str) -> None:
    """In one piece: other processes may write to the same stderr."""
    click.echo(click.style("Error: ", fg="red") + message, err=True)


def terminate(*_: object) -> None:
    """The handler of SIGTERM."""
    raise Terminated  # unwinds, so that nothing half-written stays

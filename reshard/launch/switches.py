"""The switches that every command takes, before its name or after it: `-v` and `--quiet`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import click

__all__ = ["Commands", "in_colour", "is_quiet", "switches_of", "words_of"]

_WORDS = f"{__name__}.words"
_HELP = {
    "verbose": "Show the traceback of an error.",
    "quiet": "Print only errors on stderr, no progress and no remarks.",
}


class Commands(click.Group):
    """A group that takes the switches, and gives them to each of its commands."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params += _switches()

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Register a command, which then takes the switches too."""
        cmd.params = [*cmd.params, *_switches()]
        super().add_command(cmd, name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command of a line. What follows its name is kept for `words_of`."""
        found = super().resolve_command(ctx, args)
        ctx.meta[_WORDS] = list(found[2])
        return found


def _switches() -> list[click.Parameter]:
    return [
        click.Option([f"--{name}", f"-{name[0]}"], is_flag=True, expose_value=False, callback=_remember, help=help)
        for name, help in _HELP.items()
    ]


def _remember(context: click.Context, switch: click.Parameter, value: bool) -> None:
    if value:
        if switch.name == "quiet":  # the Hub client draws the bars of an upload; it reads this when it is imported
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        context.meta[f"{__name__}.{switch.name}"] = True  # a command shares `meta` with its group


def _is_on(name: str) -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(f"{__name__}.{name}"))


def is_quiet() -> bool:
    """Whether the command that runs in this thread was given `--quiet`."""
    return _is_on("quiet")


def switches_of() -> list[str]:
    """Return the switches of the command that runs in this thread, for the line of another process."""
    return [f"--{name}" for name in _HELP if _is_on(name)]


def words_of() -> list[str]:
    """Return the words after the name of the command that runs in this thread, as they were typed."""
    return list(click.get_current_context().meta[_WORDS])


def in_colour(environment: Mapping[str, str] = os.environ) -> bool | None:
    """Whether the user wants colours: True, False, or None for "on a terminal" (click's `color`).

    Python decides in the same order: https://no-color.org, https://force-color.org, then a terminal without colours.
    """
    if environment.get("NO_COLOR"):
        return False
    if environment.get("FORCE_COLOR"):
        return True
    return False if environment.get("TERM") == "dumb" else None

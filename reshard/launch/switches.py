"""What every command takes anywhere in its line, before its name or behind it: `-v` and `--quiet`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import click

__all__ = ["Commands", "in_colour", "is_quiet", "switches_of", "words_of"]

_WORDS = f"{__name__}.words"
_HELP = {
    "verbose": "Show the traceback of an error.",
    "quiet": "No progress and no remarks on stderr: only errors.",
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
        """The command of a line; what follows its name is kept for `words_of`."""
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
        if switch.name == "quiet":  # the bars of an upload are the Hub client's own; it reads this when it is imported
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        context.meta[f"{__name__}.{switch.name}"] = True  # which a command shares with its group


def _is_on(name: str) -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(f"{__name__}.{name}"))


def is_quiet() -> bool:
    """Whether the command that runs in this thread was told to be."""
    return _is_on("quiet")


def switches_of() -> list[str]:
    """Those that the command that runs in this thread was given, for the line of another process."""
    return [f"--{name}" for name in _HELP if _is_on(name)]


def words_of() -> list[str]:
    """What follows the name of the command that runs in this thread, as it was typed."""
    return list(click.get_current_context().meta[_WORDS])


def in_colour(environment: Mapping[str, str] = os.environ) -> bool | None:
    """Whether the user wants colours: yes, no, or None, where there is a terminal (click's `color`).

    As Python itself decides: https://no-color.org, then https://force-color.org, then a terminal that has none.
    """
    if environment.get("NO_COLOR"):
        return False
    if environment.get("FORCE_COLOR"):
        return True
    return False if environment.get("TERM") == "dumb" else None

"""`--html`: a result as a page to look at, and the commands on it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..errors import DestinationExistsError, UsageError
from ..text import printable, without_secrets
from .speaking import say

__all__ = ["check_page", "html_option", "inspect_commands", "plan_commands", "write_page"]

_OF_PLAN_ONLY = {"tp_size", "gpu_memory", "max_model_len", "batch_size", "kv_dtype", "utilization", "style", "html"}
_OF_SOURCE = ("revision", "weights", "links_into")
_SPEAK = ("--prompt", "Once upon a time")
Commands = Sequence[tuple[str, str]]  # what a command does, and the command


def html_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Declare `--html`."""
    help = "Write a page with pictures too, one file to open in a browser. An earlier page is replaced."
    return click.option("--html", metavar="PAGE", help=help)(command)


def check_page(path: str) -> None:
    """Refuse what no page can be written to: call it before the work.

    Raises:
        UsageError: there is no such folder, or it is a resharded one.
        DestinationExistsError: something else than a page of ours is there.
    """
    from ..checkpoint.source import MANIFEST_NAME
    from ..showing.page.page import MARK

    target = Path(path)
    if not target.absolute().parent.is_dir():
        raise UsageError(f"{printable(path)}: no such folder")
    around = next((folder for folder in target.absolute().parents if (folder / MANIFEST_NAME).is_file()), None)
    if around is not None:
        raise UsageError(
            f"{printable(path)}: is inside a resharded folder, which holds nothing else",
            hint=f"choose a folder outside {printable(around)}",
        )
    if not os.path.lexists(target):
        return
    try:
        with target.open("rb") as file:
            ours = target.is_file() and MARK.encode() in file.read(4096)
    except OSError:
        ours = False
    if not ours:
        raise DestinationExistsError(
            f"{printable(path)}: already exists, and is not a page of ours", hint="choose another name"
        )


def write_page(path: str, report: Mapping[str, Any], commands: Commands) -> None:
    """Write the page of a report in one step: it is never half there. Raises StorageError, or as `check_page` does."""
    from ..showing.page.page import plan_page
    from ..storage.disk import write_file

    check_page(path)  # again: planning may take minutes
    text = plan_page(report, commands=commands).encode()
    write_file(Path(path), text, sync=False)
    say(f"written: {printable(path)}, {len(text):,} bytes; open it in a browser")


def plan_commands(source: str, report: Mapping[str, Any]) -> Commands:
    """Return the commands to go on with from a plan: those of its own options."""
    at = without_secrets(source)
    cut = ["--tp-size", str(report["mesh"]["tp"]), *_given(besides=_OF_PLAN_ONLY)]
    return (
        ("Cut the checkpoint, on any CPU machine:", _line("convert", at, "OUT", *cut)),
        ("Start the ranks on this machine and speak:", _line("run", "OUT", *_SPEAK, *_given("strategies"))),
        ("Compare every element with the source:", _line("verify", "OUT", "--against", at, *_given(*_OF_SOURCE))),
        ("See what other numbers of ranks would hold:", _line("plan", at, *_given(besides=_OF_PLAN_ONLY))),
    )


def inspect_commands(out: str, report: Mapping[str, Any]) -> Commands:
    """Return the commands to go on with from a resharded folder."""
    from ..showing.engines import serve_command

    at, revision = without_secrets(out), _given("revision")
    if "engine" in report:
        return (("Serve it:", shlex.join(serve_command(at, report["engine"]))),)
    check = ("Check every byte:", _line("verify", at))
    if not Path(out).is_dir():
        check = ("Fetch it, every byte checked:", _line("pull", at, *revision))
    more = str(2 * report["world_size"])
    return (
        ("Start the ranks on this machine and speak:", _line("run", at, *_SPEAK, *revision)),
        check,
        ("Cut it for another number of ranks:", _line("convert", at, "OUT", "--tp-size", more, *revision)),
        ("Get the checkpoint back:", _line("merge", at, "DEST", *revision)),
    )


def _line(*words: str) -> str:
    return shlex.join(("reshard", *words))


def _given(*only: str, besides: Collection[str] = ()) -> list[str]:
    """Return the options of the command that runs as they were given: `only` those of these names, or all `besides`."""
    context, words = click.get_current_context(), []
    for option in context.command.params:
        name = option.name or ""
        if (
            not isinstance(option, click.Option)
            or not option.expose_value
            or name in besides
            or (only and name not in only)
            or context.get_parameter_source(name) != ParameterSource.COMMANDLINE
        ):
            continue
        value, switch = context.params[name], max(option.opts, key=len)
        if option.is_flag:
            words += [switch] if value else []
        else:
            words += [word for one in (value if option.multiple else [value]) for word in (switch, str(one))]
    return words

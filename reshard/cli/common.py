"""The parts that commands share: options, and the printing of results."""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from ..checkpoint.quantization import QUANTIZATIONS
from ..files.dtypes import STORABLE, floating_dtype
from ..launch.failures import json_text
from ..launch.options import completions, format_option, revision_option, strategies_option
from ..launch.switches import switches_of, words_of

__all__ = [
    "Bytes",
    "format_option",
    "include_option",
    "no_sync_option",
    "on_ranks",
    "print_report",
    "revision_option",
    "terminal_blocks",
    "terminal_width",
    "what_to_cut",
    "where_the_weights_are",
    "workers_option",
]


def workers_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Declare `--workers`."""
    help = "Number of threads.  [default: number of CPUs, at most 8]"
    return click.option("--workers", type=click.IntRange(min=1), help=help)(command)


def no_sync_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Declare `--no-sync`."""
    help = "Do not wait for the disk. A power loss soon after can undo the work."
    return click.option("--no-sync", is_flag=True, help=help)(command)


class Dtype(click.ParamType):
    """A dtype by torch's name, or by a short one such as bf16."""

    def __init__(self, read: Callable[[object], str] = floating_dtype, names: Sequence[str] = STORABLE) -> None:
        self.name = "|".join(names)
        self._read, self._names = read, names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return torch's name of the dtype."""
        try:
            return self._read(value)
        except ValueError as error:
            self.fail(f"{value!r} is not {error}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the names."""
        return completions(self._names, incomplete)


_WHERE_THE_WEIGHTS_ARE = (
    click.option(
        "--weights",
        metavar="NAME",
        help="Where SOURCE has its weights: a subfolder, a variant such as fp16, or a file of weights or its index.",
    ),
    click.option(
        "--links-into",
        multiple=True,
        type=click.Path(exists=True, file_okay=False),
        metavar="DIR",
        help="Follow links among the weights that lead into DIR. Repeat it for more folders.",
    ),
)


def where_the_weights_are(command: Callable[..., Any]) -> Callable[..., Any]:
    """Declare `--weights` and `--links-into`, for commands that open a checkpoint."""
    for option in reversed(_WHERE_THE_WEIGHTS_ARE):
        command = option(command)
    return command


def include_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Declare `--include`."""
    help = "Copy files of unknown kinds too, such as 'assets/*'. Code, pickles and keys are never copied."
    return click.option("--include", multiple=True, metavar="PATTERN", help=help)(command)


class _Plan(click.Path):
    """A file of rules, or the name of a plan that every model has."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return `general`, or the path of a file that is there."""
        return value if value == "general" else super().convert(value, param, ctx)


_WHAT_TO_CUT = (
    click.option(
        "--ep-size",
        type=click.IntRange(min=1),
        default=1,
        help="Spread whole experts over this many ranks. One of --tp-size and --ep-size must divide the other.",
    ),
    click.option(
        "--plan",
        "tp_plan",
        type=_Plan(exists=True, dir_okay=False),
        help='Rules (pattern → style, JSON or TOML) in place of the model\'s, or added to them with extends = "auto";'
        " or general: every layer is cut by its output features.",
    ),
    strategies_option,
    revision_option,
    click.option("--dtype", type=Dtype(), help="Store floating parameters in this dtype."),
    click.option("--quantize", type=click.Choice(QUANTIZATIONS), help="Quantize the matrices, as transformers would."),
    click.option(
        "--quantize-config",
        type=click.Path(exists=True, dir_okay=False),
        metavar="FILE",
        help="JSON: options of transformers' BitsAndBytesConfig, or of FineGrainedFP8Config for fp8.",
    ),
    click.option(
        "--experts", "quantize_experts", is_flag=True, help="With --quantize: experts too, which transformers leaves."
    ),
    click.option(
        "--dequantize", is_flag=True, help="Store the values of a quantized SOURCE, in --dtype or the model's."
    ),
    click.option("--drop-unused", is_flag=True, help="Leave out tensors that the model does not use."),
    where_the_weights_are,
    include_option,
)


def what_to_cut(command: Callable[..., None]) -> Callable[..., None]:
    """Declare the options that `plan` and `convert` share. The command gets them as the library's arguments."""

    @functools.wraps(command)
    def with_library_arguments(*arguments: Any, tp_plan: str | None, strategies: str | None, **options: Any) -> None:
        if tp_plan is not None:
            options["tp_plan"] = tp_plan
        if strategies is not None:
            options["strategies"] = strategies
        command(*arguments, **options)

    for option in reversed(_WHAT_TO_CUT):
        with_library_arguments = option(with_library_arguments)
    return with_library_arguments


class Bytes(click.ParamType):
    """A number of bytes with its unit: 24GB (thousands, as GPUs are sold), 24GiB, or bytes, also as 24e9."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes of a text such as 24GB."""
        match = re.fullmatch(
            r"(\d{1,30}(?:\.\d+)?(?:e\d{1,2})?)\s*(?:([kmgtp])(i?)b?|b)?", str(value).strip(), re.IGNORECASE
        )
        if match is None:
            self.fail(f"{value!r} is not a size such as 24GB", param, ctx)
        power = 1 + "kmgtp".index(match[2].lower()) if match[2] else 0
        return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def terminal_width() -> int | None:
    """Return the columns of the terminal that results go to, None if there is none. COLUMNS overrides it."""
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS"):
        return None
    return shutil.get_terminal_size().columns


def terminal_blocks() -> bool:
    """Whether stdout can write block characters: its encoding has them."""
    try:
        "█░╱–".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def on_ranks(command: str, processes: int) -> NoReturn:
    """Run a command of the runtime on `processes` ranks, with this command's own words, and exit with their code."""
    from ..launch.agent import launch

    sys.exit(launch([*switches_of(), command, *words_of()], processes))


def print_report(report: dict[str, Any], style: str, text: Callable[[dict[str, Any]], str]) -> None:
    """Print a result on stdout, as JSON or as text."""
    click.echo(json_text(report, indent=1) if style == "json" else text(report))

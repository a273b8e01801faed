"""What the commands of the runtime share: how a model is asked for, and how one rank speaks for all."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import click

from reshard.strategies import ALL_PARALLEL_STYLES, load_strategies
from reshard.switches import is_quiet

from ..kernels import SDPA_KERNELS, check_goes_with, check_sdpa
from ..loading import load
from ..mesh import pick_device
from ..phases import load_report
from ..ranks import this_rank

__all__ = [
    "FiniteRange",
    "format_option",
    "is_first",
    "load_model",
    "model_options",
    "replicas_option",
    "say",
    "sdpa_option",
]


class FiniteRange(click.FloatRange):
    """A range of numbers: `nan` and `inf` are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or a usage error."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return float(number)


_OPTIONS = (
    click.option("--revision", help="Branch, tag or commit where OUT is a Hub id."),
    click.option(
        "--device",
        metavar="cpu|cuda|cuda:N",
        help="cuda: a GPU for each rank. cuda:N: that one for all ranks, over gloo. [default: cuda where there is one]",
    ),
    click.option("--no-digests", is_flag=True, help="Do not check the digests of this rank's file, and of small ones."),
    click.option("--attn", help="Attention implementation: sdpa, eager, flash_attention_2, flash_attention_3 …"),
    click.option("--report", is_flag=True, help="Say on stderr what the load took, on rank 0 and on the slowest rank."),
    click.option(
        "--sequence-parallel",
        is_flag=True,
        help="Between a layer's blocks, each rank holds its slice of the sequence only: less memory for activations.",
    ),
    click.option(
        "--timeout",
        type=FiniteRange(min=0, min_open=True),
        default=1800,
        show_default=True,
        help="Seconds within which every rank must have loaded; the one that has not is named, and all end.",
    ),
    click.option(
        "--strategies",
        type=click.Path(exists=True, dir_okay=False),
        help="Python file that registers the styles of your own that OUT was made with. It is run.",
    ),
)


def format_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--format`, as the argument `style`."""
    kinds = click.Choice(["text", "json"])
    return click.option("--format", "style", type=kinds, default="text", help="How to print the result.")(command)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that loads a model: what `load_model` takes."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def replicas_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--dp`, as the argument `dp_size` of `load_model`."""
    help = "Replicas of the model, each of ranks in a row: start K times as many processes as OUT has ranks."
    return click.option("--dp", "dp_size", type=click.IntRange(min=1), default=1, metavar="K", help=help)(command)


def sdpa_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--sdpa`, as the argument `kernel`: for `with sdpa(kernel)` around the load and what is computed."""
    help = "Which of torch's kernels computes attention sdpa; no other in its place.  [default: torch chooses]"
    return click.option("--sdpa", "kernel", type=click.Choice(list(SDPA_KERNELS)), help=help)(command)


def load_model(
    out: str,
    *,
    strategies: str | None,
    no_digests: bool,
    attn: str | None,
    report: bool,
    device: str | None,
    kernel: str | None = None,
    **options: Any,
) -> Any:
    """The model at `out`, loaded as `model_options` and `sdpa_option` say: call it inside `with sdpa(kernel)`.

    Raises UsageError where the kernel cannot compute the model's attention on the device, or that does not use it.
    """
    if kernel is not None and attn is not None:
        check_goes_with(kernel, attn)
    known = load_strategies(strategies) if strategies else ALL_PARALLEL_STYLES
    if kernel is not None:  # at all; whether it can compute this model, the load looks
        check_sdpa(kernel, pick_device(device, this_rank().local_rank))
    model = load(
        out, device=device, check_digests=not no_digests, attn_implementation=attn, strategies=known, **options
    )
    if report:
        say(load_report(model), err=True)
    return model


def is_first() -> bool:
    """Whether this process is rank 0, which speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str, *, err: bool = False) -> None:
    """Print on stdout or stderr, on rank 0; with `--quiet`, on stdout alone."""
    if is_first() and not (err and is_quiet()):
        click.echo(text, err=err)

"""Helpers of all commands of a rank: load the model that the options name, and print on one rank."""

from __future__ import annotations

import os
from typing import Any

import click

from reshard.launch.asked import check_model_options
from reshard.launch.switches import is_quiet
from reshard.strategies.registry import ALL_PARALLEL_STYLES, load_strategies

from ..distributed.mesh import pick_device
from ..distributed.ranks import this_rank
from ..loading.load import load
from ..loading.phases import load_report
from ..model.kernels import check_sdpa

__all__ = [
    "is_first",
    "load_model",
    "say",
]


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
    """Load the model at `out` as a command's options say. Call it inside `with sdpa(kernel)`.

    Raises UsageError if the kernel cannot compute the model's attention on the device, or the attention does not use
    torch's kernels.
    """
    check_model_options({"kernel": kernel, "attn": attn})
    known = load_strategies(strategies) if strategies else ALL_PARALLEL_STYLES
    if kernel is not None:  # whether it runs here at all; `load` checks it for this model
        check_sdpa(kernel, pick_device(device, this_rank().local_rank))
    model = load(
        out, device=device, check_digests=not no_digests, attn_implementation=attn, strategies=known, **options
    )
    if report:
        say(load_report(model), err=True)
    return model


def is_first() -> bool:
    """Whether this process is rank 0, which prints for all."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str, *, err: bool = False) -> None:
    """Print to stdout, or to stderr unless `--quiet`, on rank 0 only."""
    if is_first() and not (err and is_quiet()):
        click.echo(text, err=err)

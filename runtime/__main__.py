"""`torchrun --nproc-per-node N -m runtime generate|check OUT …`. One rank speaks; the others are quiet."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
import traceback
import warnings
from typing import Any

import click

from reshard.errors import IntegrityError, ReshardError
from reshard.failures import report_failure, wants_traceback
from reshard.strategies import ALL_PARALLEL_STYLES, load_strategies

from . import load
from .agreement import Deadline
from .check import check as compare
from .generate import generate_text, load_tokenizer
from .mesh import connect, shut_down
from .ranks import this_rank

_TO_SPEAK = 1.0  # seconds to reach the store, which says who does
_TO_END = 0.5  # seconds from when a process closes its sockets until it has ended
_PARENT = os.getppid()

_out = click.argument("out")
_revision = click.option("--revision", help="Branch, tag or commit where OUT is a Hub id.")
_device = click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
_no_digests = click.option("--no-digests", is_flag=True, help="Do not check the digests of this rank's file.")
_attn = click.option("--attn", help="Attention implementation: sdpa, eager, flash_attention_2 …")
_timeout = click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=1800,
    show_default=True,
    help="Seconds within which every rank must have loaded; the one that has not is named, and all end.",
)
_strategies = click.option(
    "--strategies",
    type=click.Path(exists=True, dir_okay=False),
    help="Python file that registers the styles of your own that OUT was made with. It is run.",
)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    if _is_first():
        click.echo(text)


def _load(out: str, *, strategies: str | None, no_digests: bool, attn: str | None, **options: Any) -> Any:
    known = load_strategies(strategies) if strategies else ALL_PARALLEL_STYLES
    return load(out, check_digests=not no_digests, attn_implementation=attn, strategies=known, **options)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--verbose", "-v", is_flag=True, help="Show the traceback of an error.")
def cli(verbose: bool) -> None:
    """Run a resharded folder. Start one process for each rank with torchrun."""


@cli.command()
@_out
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=32, show_default=True)
@_revision
@_device
@_no_digests
@_attn
@_timeout
@_strategies
def generate(out: str, prompt: str, max_new_tokens: int, revision: str | None, **options: Any) -> None:
    """Continue a prompt greedily.

    \b
    Example:
      torchrun --nproc-per-node 2 -m runtime generate llama-tp2 --prompt "Once"
    """
    model = _load(out, revision=revision, **options)
    tokenizer = load_tokenizer(model.name_or_path)
    _say(generate_text(model, tokenizer, prompt, max_new_tokens))


@cli.command()
@_out
@click.option("--reference", required=True, metavar="SOURCE", help="The checkpoint that OUT was made from.")
@_revision
@_device
@_no_digests
@_attn
@_timeout
@_strategies
@click.option("--format", "style", type=click.Choice(["text", "json"]), default="text")
def check(out: str, reference: str, style: str, **options: Any) -> None:
    """Compare logits and greedy tokens with the single-process model; exit 4 where rounding does not explain them.

    \b
    Example:
      torchrun --nproc-per-node 2 -m runtime check llama-tp2 --reference ./llama
    """
    model = _load(out, **options)
    parity = compare(model, reference)
    tokens = {True: "equal", False: "different", None: "not generated"}[parity.equal_tokens]
    text = f"max abs {parity.max_abs:.3g}, max rel {parity.max_rel:.3g} (limit {parity.tolerance:g}), tokens {tokens}"
    _say(json.dumps(parity.to_json()) if style == "json" else f"{out}: {text}")
    if not parity.ok:
        raise IntegrityError(f"{out}: the sharded model does not compute what {reference} does")


def _fail(error: BaseException) -> int:
    """Say what went wrong, if no other rank does. Returns the exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, once another has ended: nobody is to die in mid-word
    verbose = wants_traceback(sys.argv)
    if _speaks_first():
        return report_failure(error, verbose=verbose)
    if verbose:
        traceback.print_exception(error)
    with contextlib.redirect_stderr(io.StringIO()):
        return report_failure(error, verbose=False)


def _speaks_first() -> bool:
    """Whether this rank is the first to ask the store. Without one: rank 0, or any rank that is cut off by itself."""
    try:
        info = this_rank()
    except ReshardError:
        return True
    try:
        return connect(info, Deadline.after(_TO_SPEAK)).add("reshard/spoken", 1) == 1
    except (ReshardError, RuntimeError):
        if info.rank != 0:
            time.sleep(_TO_END)
        return info.rank == 0 or os.getppid() == _PARENT  # torchrun, which holds the store, is not what has ended


def main() -> None:
    """Run a command on this rank. A failure is said once, whoever has it and however many."""
    warnings.filterwarnings("ignore", module="torch.distributed")
    code: Any = 0
    try:
        cli.main(prog_name="python -m runtime", standalone_mode=False)
        shut_down()
    except click.exceptions.Exit as finished:
        code = finished.exit_code
    except (Exception, KeyboardInterrupt) as error:
        code = _fail(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: gloo's threads can abort the interpreter while it shuts down, and the work would count as failed.
    # Nor is a group left that has failed: that would wait for the others.
    os._exit(code)


main()

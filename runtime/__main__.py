"""`torchrun --nproc-per-node N -m runtime generate|check OUT …`. Rank 0 speaks; the others are quiet."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from typing import Any

import click

from reshard.errors import IntegrityError
from reshard.failures import report_failure, wants_traceback
from reshard.strategies import ALL_PARALLEL_STYLES, load_strategies

from . import load
from .check import check as compare
from .generate import generate_text, load_tokenizer
from .mesh import shut_down

_LET_THE_FIRST_SPEAK = 3.0  # seconds

_out = click.argument("out")
_revision = click.option("--revision", help="Branch, tag or commit where OUT is a Hub id.")
_device = click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
_no_digests = click.option("--no-digests", is_flag=True, help="Do not check the digests of this rank's file.")
_attn = click.option("--attn", help="Attention implementation: sdpa, eager, flash_attention_2 …")
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


def _load(
    out: str, strategies: str | None, *, revision: str | None, device: str | None, digests: bool, attn: str | None
) -> Any:
    known = load_strategies(strategies) if strategies else ALL_PARALLEL_STYLES
    return load(
        out,
        revision=revision,
        device=device,
        check_digests=digests,
        attn_implementation=attn,
        strategies=known,
    )


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
@_strategies
def generate(
    out: str,
    prompt: str,
    max_new_tokens: int,
    revision: str | None,
    device: str | None,
    no_digests: bool,
    attn: str | None,
    strategies: str | None,
) -> None:
    """Continue a prompt greedily.

    \b
    Example:
      torchrun --nproc-per-node 2 -m runtime generate llama-tp2 --prompt "Once"
    """
    model = _load(out, strategies, revision=revision, device=device, digests=not no_digests, attn=attn)
    tokenizer = load_tokenizer(model.name_or_path)
    _say(generate_text(model, tokenizer, prompt, max_new_tokens))


@cli.command()
@_out
@click.option("--reference", required=True, metavar="SOURCE", help="The checkpoint that OUT was made from.")
@_revision
@_device
@_no_digests
@_attn
@_strategies
@click.option("--format", "style", type=click.Choice(["text", "json"]), default="text")
def check(
    out: str,
    reference: str,
    revision: str | None,
    device: str | None,
    no_digests: bool,
    attn: str | None,
    strategies: str | None,
    style: str,
) -> None:
    """Compare logits and greedy tokens with the single-process model; exit 4 where rounding does not explain them.

    \b
    Example:
      torchrun --nproc-per-node 2 -m runtime check llama-tp2 --reference ./llama
    """
    model = _load(out, strategies, revision=revision, device=device, digests=not no_digests, attn=attn)
    parity = compare(model, reference)
    tokens = {True: "equal", False: "different", None: "not generated"}[parity.equal_tokens]
    text = f"max abs {parity.max_abs:.3g}, max rel {parity.max_rel:.3g} (limit {parity.tolerance:g}), tokens {tokens}"
    _say(json.dumps(parity.to_json()) if style == "json" else f"{out}: {text}")
    if not parity.ok:
        raise IntegrityError(f"{out}: the sharded model does not compute what {reference} does")


def main() -> None:
    """Run a command on this rank. What fails on every rank is said by the first: it speaks and ends, and torchrun
    stops the others while they wait. A rank that fails alone speaks after the wait."""
    warnings.filterwarnings("ignore", module="torch.distributed")
    code: Any = 0
    try:
        cli.main(prog_name="python -m runtime", standalone_mode=False)
    except click.exceptions.Exit as finished:
        code = finished.exit_code
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_LET_THE_FIRST_SPEAK)
        code = report_failure(error, verbose=wants_traceback(sys.argv))
    finally:
        shut_down()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: gloo's threads can abort the interpreter while it shuts down, and the work would count as failed.
    os._exit(code)


main()

"""`reshard run`."""

from __future__ import annotations

import sys

import click

from ..switches import switches_of

__all__ = ["run"]


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("out", type=click.Path())
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option("--dp", type=click.IntRange(min=1), default=1, metavar="K", help="Replicas: K times as many processes.")
def run(out: str, options: tuple[str, ...], dp: int) -> None:
    """Generate text from the resharded folder OUT, on as many processes as it has ranks.

    OPTIONS are those of `python -m runtime generate`, whose help has them all. What to continue: --prompt, --prompts,
    --chat. How: --max-new-tokens, --stop, --temperature, --top-p, --top-k, --seed, --batch-size. By which kernels:
    --device, --attn, --sdpa, --cache, --compile. What to print: --format, --report.

    \b
    Examples:
      reshard run llama-tp2 --prompt "The capital of France is"
      reshard run llama-tp2 --chat --max-new-tokens 500
      reshard run llama-tp2 --prompts lines.txt --format json
      reshard run llama-tp2 --prompt "Once" --temperature 0.8 --top-p 0.9 --seed 7
    """
    from ..launch.agent import launch

    sys.exit(launch(out, [*switches_of(), "generate", out, "--dp", str(dp), *options], replicas=dp))

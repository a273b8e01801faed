"""`reshard run`."""

from __future__ import annotations

from typing import Any

import click

from ..launch.options import generate_options
from .common import on_ranks

__all__ = ["run"]


@click.command()
@generate_options
def run(out: str, **options: Any) -> None:
    """Generate text from OUT, on as many processes as it has ranks.

    OUT is a resharded folder, repo or URL. Decoding is greedy unless --temperature is given. The text of a single
    prompt and the answers of a chat are printed as they are generated. --format json prints one object per line: the
    prompt, the new text, how many tokens each has, why it ended (eos, stop or length), and the seed if it was sampled.
    The folder's generation_config.json holds unless an option says otherwise; its do_sample and num_beams are ignored.

    \b
    Examples:
      reshard run llama-tp2 --prompt "The capital of France is"
      reshard run llama-tp2 --chat --max-new-tokens 500
      reshard run llama-tp2 --prompts lines.txt --format json
      reshard run llama-tp2 --prompt "Once" --temperature 0.8 --top-p 0.9 --seed 7
    """
    from ..launch.asked import check_generation, look_at_folder, look_at_prompts

    check_generation(options)
    look_at_prompts(options["file"])
    manifest = look_at_folder(out, options["revision"])
    on_ranks("generate", manifest.world_size * options["dp_size"])

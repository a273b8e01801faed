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
    """Generate text from the resharded folder, repo or URL OUT, on as many processes as it has ranks.

    Greedily unless --temperature is given. The text of a single prompt and a chat's answers come as they are made.
    --format json prints an object a line: the prompt, the new text, how many tokens both have, why it ended (eos, stop
    or length), and the seed if it was sampled. The folder's generation_config.json holds where no option says
    otherwise, but for its do_sample and num_beams.

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

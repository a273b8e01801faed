"""`reshard pull`."""

from __future__ import annotations

import re
from typing import Any

import click

from .common import format_option, print_report, revision_option
from .speaking import progress_bar

__all__ = ["pull"]


class _Ranks(click.ParamType):
    """Numbers and ranges: `0-3`, `0,2`, `5`."""

    name = "ranks"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> list[int]:
        if not re.fullmatch(r"\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*", value):
            self.fail(f"{value!r} is not like 0-3 or 0,2", param, context)
        spans = [[int(number) for number in part.split("-")] for part in value.split(",")]
        if any(span[0] > span[-1] for span in spans):
            self.fail(f"{value!r} runs backwards", param, context)
        return [rank for span in spans for rank in range(span[0], span[-1] + 1)]


@click.command()
@click.argument("repo")
@click.option("--ranks", "--rank", type=_Ranks(), help="Only these ranks: 0-3 or 0,2 or 5.  [default: everything]")
@click.option(
    "--part",
    metavar="I/K",
    help="Only the ranks of one of K machines; auto: as torchrun, Slurm, MPI or Kubernetes (auto/K) says.",
)
@click.option("--to", type=click.Path(file_okay=False), metavar="DIR", help="Fetch into DIR, not into the cache.")
@revision_option
@format_option
def pull(repo: str, ranks: list[int] | None, to: str | None, style: str, **which: str | None) -> None:
    """Fetch a resharded REPO, or only the files of some ranks.

    REPO is org/name, org/name/tp4 or a URL. The folder is printed. Every digest is checked: a wrong file is removed,
    and the command fails. Files that are there already are not fetched again. If all are there, HF_HUB_OFFLINE=1 keeps
    the command off the network.

    \b
    Examples:
      reshard pull org/llama/tp8 --ranks 0-3
      reshard pull s3://bucket/llama-tp4 --rank 1 --to ./llama-tp4
      reshard pull org/llama/tp8 --part 2/4
    """
    from .. import pull as run

    folder = run(repo, ranks=ranks, to=to, progress=progress_bar, **which)
    print_report({"folder": str(folder)}, style, lambda found: found["folder"])

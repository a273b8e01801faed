"""The commands that talk to the Hub. The token is that of the environment, or of `hf auth login`."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .cli_common import format_option, print_report, progress_bar, revision_option

__all__ = ["publish", "pull"]


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
@click.argument("out", type=click.Path())
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repo private where it is made now.")
@click.option("--license", "licence", metavar="ID", help="The licence, where it takes your word to publish openly.")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to, made if it is missing.  [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing to the branch.")
@click.option("--dry-run", is_flag=True, help="Say what would be published, and change nothing.")
@format_option
def publish(out: str, repo: str, style: str, **options: Any) -> None:
    """Publish the resharded folder OUT as REPO: org/name, or a folder of it, org/name/tp4.

    One commit holds the files, the manifest and the model card; until then nothing can be seen. Digests are checked
    before, and what the Hub holds after. Run again after an interruption, only what is missing is sent. A source that
    is gated or private, or whose licence is not known, is published openly only with --license.

    \b
    Examples:
      reshard publish llama-tp4 org/llama-tp4
      reshard publish llama-tp8 org/llama/tp8 --private
    """
    from . import publish as run
    from .manifest import read_manifest

    total = sum(record.size for record in read_manifest(Path(out)).rank_files)
    with progress_bar(total, "checking") as report:
        done = run(out, repo, progress=report, **options)
    print_report({**asdict(done), "deleted": list(done.deleted)}, style, _published_text)


def _published_text(done: dict[str, Any]) -> str:
    place = f"{done['repo_id']}/{done['path']}".rstrip("/")
    who = "private" if done["private"] else "public"
    what = f"{done['files']} files, {done['size']:,} bytes, {who}, licence {done['licence'] or 'not known'}"
    if not done["card"]:
        what += "; README.md is not ours and stays"
    if done["deleted"]:
        what += f"; {len(done['deleted'])} files of before go"
    if done["commit"] is None:
        return f"{place}@{done['revision']}: would be {what}"
    return f"{place}: {what}\n{done['url']}"


@click.command()
@click.argument("repo")
@click.option("--ranks", "--rank", type=_Ranks(), help="Only these: 0-3 or 0,2 or 5.  [default: everything]")
@click.option("--to", type=click.Path(file_okay=False), metavar="DIR", help="Fetch into DIR, not into the cache.")
@revision_option
@format_option
def pull(repo: str, ranks: list[int] | None, to: str | None, revision: str | None, style: str) -> None:
    """Fetch a resharded REPO (org/name, or org/name/tp4), or only the files of some ranks, and print the folder.

    Every digest is checked. A file that is not what it should be is removed, and the command fails. What is there is
    not fetched again: the next time nothing is asked of the network with HF_HUB_OFFLINE=1.

    \b
    Examples:
      reshard pull org/llama/tp8 --ranks 0-3
      reshard pull s3://bucket/llama-tp4 --rank 1 --to ./llama-tp4
    """
    from . import pull as run

    with progress_bar(0, "checking") as report:
        folder = run(repo, ranks=ranks, revision=revision, to=to, progress=report)
    print_report({"folder": str(folder)}, style, lambda found: found["folder"])

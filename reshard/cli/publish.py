"""`reshard publish`. The token comes from the environment, or from `hf auth login`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from .common import format_option, print_report
from .speaking import progress_bar

__all__ = ["publish"]


@click.command()
@click.argument("out", type=click.Path())
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repo private if it is created now.")
@click.option(
    "--license", "licence", metavar="ID", help="Licence of the model: your word that it may be published openly."
)
@click.option("--revision", metavar="BRANCH", help="Branch to commit to, created if it is missing.  [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing to the branch.")
@click.option("--dry-run", is_flag=True, help="Say what would be published, and change nothing.")
@format_option
def publish(out: str, repo: str, style: str, **options: Any) -> None:
    """Publish the resharded folder OUT as REPO on the Hub.

    REPO is org/name, or a folder of it, org/name/tp4. One commit makes the files, the manifest and the model card
    visible together. Digests are checked before it, and what the Hub holds after it. If it is interrupted, run it
    again: only what is missing is sent. If the source is gated or private, or its licence is not known, publishing
    openly needs --license.

    \b
    Examples:
      reshard publish llama-tp4 org/llama-tp4
      reshard publish llama-tp8 org/llama/tp8 --private
    """
    from .. import publish as run

    done = run(out, repo, progress=progress_bar, **options)
    print_report({**asdict(done), "deleted": list(done.deleted)}, style, _published_text)


def _published_text(done: dict[str, Any]) -> str:
    place = f"{done['repo_id']}/{done['path']}".rstrip("/")
    who = "private" if done["private"] else "public"
    what = f"{done['files']} files, {done['size']:,} bytes, {who}, licence {done['licence'] or 'not known'}"
    if not done["card"]:
        what += "; README.md is not ours and stays"
    if done["deleted"]:
        what += f"; {len(done['deleted'])} earlier files are deleted"
    if done["commit"] is None:
        return f"{place}@{done['revision']}: would be {what}"
    return f"{place}: {what}\n{done['url']}"

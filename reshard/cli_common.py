"""What the commands share: options, how a result is printed, and how far work has come."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import click

__all__ = ["Bytes", "format_option", "print_report", "progress_bar", "revision_option"]


def format_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--format`, as the argument `style`."""
    kinds = click.Choice(["text", "json"])
    return click.option("--format", "style", type=kinds, default="text", help="How to print the result.")(command)


def revision_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--revision`."""
    return click.option("--revision", help="Branch, tag or commit of a Hub id.")(command)


class Bytes(click.ParamType):
    """A number of bytes with its unit: 24GB (thousands, as GPUs are sold), 24GiB, or bytes, also as 24e9."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes of a text such as 24GB."""
        match = re.fullmatch(
            r"(\d{1,30}(?:\.\d+)?(?:e\d{1,2})?)\s*(?:([kmgtp])(i?)b?|b)?", str(value).strip(), re.IGNORECASE
        )
        if match is None:
            self.fail(f"{value!r} is not a size such as 24GB", param, ctx)
        power = 1 + "kmgtp".index(match[2].lower()) if match[2] else 0
        return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def print_report(report: dict[str, Any], style: str, text: Callable[[dict[str, Any]], str]) -> None:
    """Print a result on stdout, as JSON or in words."""
    # JSON has every other character that moves a cursor escaped.
    click.echo(json.dumps(report, indent=1).replace("\x7f", "\\u007f") if style == "json" else text(report))


@contextlib.contextmanager
def progress_bar(total: int, what: str = "writing") -> Iterator[Callable[[int], object]]:
    """A bar on stderr where that is a terminal, nothing elsewhere."""
    from tqdm import tqdm

    lock = threading.Lock()
    with tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None, leave=False, file=sys.stderr) as bar:

        def update(size: int) -> None:
            with lock:
                bar.update(size)

        yield update

"""`bench` outside of ranks: a job for each folder and engine, and the report of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from ...errors import UsageError
from ...storage.locate import resolve_source
from ...text import printable
from ..asked import check_model_options
from ..failures import json_text
from ..switches import words_of
from .chart import check_chart, draw
from .runs import Job, JobFailedError, Report, run_jobs, summary

__all__ = ["bench_folders", "draw_report", "report_text"]


def bench_folders(options: Mapping[str, Any]) -> Report:
    """Measure folders, each on as many processes as it has ranks, and draw the chart if one is asked for.

    `options` are the parameters of the running command, by name; each job gets the words of its command line.

    Raises:
        UsageError: no chart can be drawn at `plot`, or `against` has no `source`.
        ReshardError: a folder or the source cannot be used.
        Exit: a rank failed, and has said why; the code is its own.
    """
    check_model_options(options)
    against, source, plot = options["against"], options["source"], options["plot"]
    if against and source is None:
        raise UsageError("--against runs the checkpoint that OUT was made from", hint="name it: --source SOURCE")
    if plot:
        check_chart(plot)
    if against:
        resolve_source(source)  # now, not only after this runtime was measured
    jobs = [Job("reshard", out, compute) for compute in options["computes"] for out in options["outs"]]
    jobs += [Job(name, out) for name in against for out in options["outs"]]
    try:
        report = run_jobs(jobs, words_of(), options["repeat"], revision=options["revision"])
    except JobFailedError as failed:
        raise click.exceptions.Exit(failed.exit_code) from None
    if plot:
        draw_report(report, plot)
    return report


def draw_report(report: Report, path: str) -> None:
    """Draw the speed-up over the fewest ranks against the batch size, a line for each engine and number of ranks."""
    base = report.base
    batches: Sequence[int] = sorted({point.batch for point in base.points})
    title = f"{base.model}, {base.dtype}, prompts of {base.length} tokens, {base.device}"
    over = "one rank" if base.ranks == 1 else f"{base.ranks} ranks"
    over += f" of {printable(base.folder)}" if base.folder else ""
    draw(path, title, "batch size", f"speed-up over {over}", report.lines(), ticks=batches)


def report_text(report: Report, style: str) -> str:
    """Return a report as tables, or as JSON."""
    return json_text(report.to_json(), indent=1) if style == "json" else summary(report)

"""A plan or a manifest as a page of its own: one file that loads nothing and runs only its own script.

The page's policy (https://www.w3.org/TR/CSP3/) admits one script and one style sheet, by their digests. Names come
from files that nobody vouches for: every one is escaped, by Jinja or in the page's JSON. The same report gives the same
bytes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...sharding.topology import Topology
from ...text import printable
from ..loads import KINDS, RankLoad, is_replicated, rank_loads
from ..tables import gigabytes
from ..texts import remarks, sizes_text
from .facts import advice, even_share, findings, glance, held, legal_sizes, ratio, share
from .groups import groups_of

if TYPE_CHECKING:
    import jinja2

__all__ = ["MARK", "bars_of", "environment", "plan_page", "rank_colours", "stylesheet"]

MARK = '<meta name="generator" content="reshard">'  # a page with it is ours, and may be replaced
_TEMPLATES = Path(__file__).parent / "templates"
_MOST = 1000  # characters shown of a text
_BARS = 1000  # the width of the longest bar, in units of the drawing


def plan_page(report: Mapping[str, Any], *, commands: Sequence[tuple[str, str]] = ()) -> str:
    """Return the HTML of a report: the dict of a plan, or of a manifest.

    `commands` are those to go on with, each with what it does.
    """
    loads = rank_loads(report)
    script, style = _text("page.js"), f"{stylesheet()}{rank_colours(len(loads))}{_text('page.css')}"
    template = environment().get_template("page.html")
    return template.render(
        report=report,
        mark=MARK,
        policy=f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; base-uri 'none';"
        " form-action 'none'",
        style=style,
        script=script,
        data=_inert(report),
        ranks=str(Topology(**report["mesh"])),
        kinds=KINDS,
        glance=glance(report, loads),
        findings=findings(report, loads),
        bars=bars_of(report, loads, _BARS),
        groups=groups_of(report),
        rows=report["parameters"],
        held=[ratio(held(row)) for row in report["parameters"]],
        replicated=[is_replicated(row) for row in report["parameters"]],
        sizes=legal_sizes(report),
        reasons=sizes_text(dict(legal_sizes(report)))[1:],
        advice=advice(report),
        remarks=remarks(report),
        commands=commands,
    )


def bars_of(report: Mapping[str, Any], loads: Sequence[RankLoad], width: float) -> dict[str, Any]:
    """Return the bars of the ranks: for each its parts (kind, start, length), by bytes, in a drawing of this width."""
    longest = max((load.weights + (load.cache or 0) for load in loads), default=0) or 1
    bars = []
    for load in loads:
        at, parts = 0, []
        for kind, size in [*load.kinds.items(), ("cache", load.cache or 0)]:
            if size:
                parts.append((kind, round(width * at / longest, 1), round(width * size / longest, 1)))
            at += size
        bars.append({"load": load, "parts": parts, "share": share(load, report)})
    fullest = max(loads, key=lambda load: load.weights)
    legend = [(kind, KINDS[kind], size) for kind, size in fullest.kinds.items() if size]
    legend += [("cache", "KV cache", fullest.cache)] if fullest.cache else []
    return {
        "ranks": bars,
        "width": width,
        "even": round(width * even_share(report) / longest, 1),
        "legend": legend,
    }


@functools.cache
def environment() -> jinja2.Environment:
    """Return what renders the templates: everything that they are given is escaped, and nothing may be missing."""
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["bytes"] = gigabytes
    return found


def _shown(value: Any) -> Any:
    """Escape control and bidi characters of what a template shows; markup of ours is markup already."""
    return printable(value, _MOST) if type(value) is str else value


def stylesheet() -> str:
    """Return the style sheet of all drawings, but for the ranks' colours."""
    return _text("colours.css")


def rank_colours(world_size: int) -> str:
    """Return the style sheet of the ranks' colours: hues around the circle, and two of each tone if there are many."""
    tones = ((0.78, 0.13), (0.66, 0.13)) if world_size > 8 else ((0.75, 0.13),)
    return "".join(
        f".r{rank}{{fill:oklch({tone[0]} {tone[1]} {(230 + 360 * rank // world_size) % 360})}}\n"
        for rank, tone in ((rank, tones[rank % len(tones)]) for rank in range(world_size))
    )


def _text(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """Return the digest by which the page's policy knows a script or a style sheet."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _inert(report: Mapping[str, Any]) -> str:
    """Return JSON that nothing in a page takes for markup, whatever the names in it."""
    text = json.dumps(report, separators=(",", ":"))  # of ASCII, so U+2028 is escaped too
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

"""The text of a `check` result."""

from __future__ import annotations

from reshard.text import printable

from .check import Parity, Quality
from .differences import Altered, Difference

__all__ = ["parity_text"]

_TOKENS = {True: "equal", False: "different", None: "not generated"}
_TIED = "different, which rounding explains"


def parity_text(out: str, parity: Parity, *, per_layer: bool) -> str:
    """Return one line, and more lines if a module or parameter differs; with `per_layer`, also if none does."""
    lines = [
        f"{printable(out)}: max abs {parity.max_abs:.3g}, max rel {parity.max_rel:.3g} (limit {parity.tolerance:g}),"
        f" tokens {_TIED if parity.tied_tokens else _TOKENS[parity.equal_tokens]}"
    ]
    if parity.quality:
        lines.append(_quality(parity.quality))
    if parity.difference:
        lines += _difference(parity.difference)
    elif parity.unreached:
        lines.append("no module differs, but these tokens do not reach all that is in the files:")
        lines += map(_altered, parity.unreached)
    elif per_layer:
        lines.append("no module differs")
    return "\n".join(lines)


def _quality(found: Quality) -> str:
    return (
        f"quantizing changed the next token's probabilities by {found.divergence:.3g} nats of KL divergence on average"
        f" (most {found.largest_divergence:.3g}); the most probable token stays the same at {found.same_token:.0%} of"
        " positions"
    )


def _difference(found: Difference) -> list[str]:
    ranks = "every rank" if len(found.ranks) == found.world_size else f"rank {', '.join(map(str, found.ranks))}"
    style = f" ({printable(found.style)})" if found.style else ""
    lines = [
        f"first difference: {printable(found.module) or 'the model'}{style}",
        f"  seen in {printable(found.seen)} on {ranks}: max abs {found.max_abs:.3g}, max rel {found.max_rel:.3g}"
        f" (limit {found.tolerance:g}); what comes before agrees",
    ]
    lines += map(_altered, found.altered)
    for name, (ours, theirs) in found.configuration.items():
        lines.append(f"  config.json: {printable(name)} is {printable(ours)} here, {printable(theirs)} in the source")
    if not found.altered and not found.configuration:
        lines.append("  its parameters and the configuration are those of the source: so a style or a kernel is wrong")
    elif not found.altered:
        lines.append("  its parameters are those of the source")
    return lines


def _altered(altered: Altered) -> str:
    where = ", ".join(f"{count:,} elements in {printable(name)}" for name, count in altered.files.items())
    return f"  {printable(altered.name)} is not that of the source: {where}"

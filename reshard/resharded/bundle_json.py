"""Bundles as the manifest writes them. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..files.untrusted import UnknownError, count, counts, text
from ..text import printable
from ..transforms.bundle import Follows, Member, Quantized, matrices, member_placement, member_shape
from .targets import Target

__all__ = ["Quantizations", "check_members"]

_KNOWN = {"format", "options", "members"}


class Quantizations:
    """The manifest's table of quantizations: a format, its options, and what the dims of its tensors follow.

    A bundle refers to one, so a table of a few serves all layers.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def to_json(self) -> list[dict[str, Any]]:
        return self._rows

    def refer(self, quantized: Quantized) -> dict[str, Any]:
        """Return what a bundle's JSON object has beside the members of a parameter; add to the table if need be."""
        row = {
            "format": quantized.format,
            "options": dict(quantized.options),
            "members": {
                member.role: [[at.dim, at.unit, at.width] for at in member.dims]
                for member in quantized.members.values()
            },
        }
        number = self._numbers.setdefault(json.dumps(row, sort_keys=True), len(self._rows))
        if number == len(self._rows):
            self._rows.append(row)
        content: dict[str, Any] = {
            "quantization": number,
            "members": {member.role: name for name, member in quantized.members.items()},
        }
        if any(len(along) > 1 for along in quantized.blocks):
            content["blocks"] = [list(along) for along in quantized.blocks]
        if lengths := {m.role: list(m.lengths) for m in quantized.members.values() if m.lengths}:
            content["lengths"] = lengths
        return content

    @classmethod
    def from_json(cls, content: Iterable[Mapping[str, Any]]) -> Quantizations:
        """Read the table. Raises UnknownError, or an error of a malformed manifest."""
        found = cls()
        for row in content:
            if unknown := sorted(row.keys() - _KNOWN):
                raise UnknownError(f"has a quantization with {printable(unknown[0])}")
            text(row["format"])
            if not isinstance(row["options"], dict) or not isinstance(row["members"], dict):
                raise ValueError("a quantization without options or members")
            found._rows.append(dict(row))
        return found

    def find(self, content: Mapping[str, Any], shape: tuple[int, ...]) -> Quantized:
        """Return how the parameter of a bundle's JSON object is quantized. Raises ValueError, TypeError, KeyError or
        IndexError if a parameter of this shape cannot be."""
        row = self._rows[count(content["quantization"])]
        blocks = tuple(map(counts, content.get("blocks") or ([size] for size in shape)))
        if tuple(map(sum, blocks)) != shape or any(0 in along and len(along) > 1 for along in blocks):
            raise ValueError(f"blocks {blocks} in a shape of {shape}")
        dims = {role: tuple(Follows(*counts(at)) for at in of) for role, of in row["members"].items()}
        if any(at.dim >= len(shape) for of in dims.values() for at in of):
            raise ValueError(f"a tensor that follows a dim beyond {shape}")
        named = {text(role): text(name) for role, name in content["members"].items()}
        if named.keys() != dims.keys():
            raise ValueError(f"tensors {sorted(named)} for the roles {sorted(dims)}")
        lengths = {role: counts(of) for role, of in content.get("lengths", {}).items()}
        if any(dims[role] or len(of) != matrices(blocks) for role, of in lengths.items()):
            raise ValueError(f"lengths of {sorted(lengths)} that are not those of {matrices(blocks)} matrices")
        members = {name: Member(role, dims[role], lengths.get(role, ())) for role, name in named.items()}
        if len(members) < len(named):
            raise ValueError("one tensor in two roles")
        return Quantized(row["format"], row["options"], members, blocks)


def check_members(target: Target, quantized: Quantized, tensors: Mapping[str, Target], world_size: int) -> None:
    """Raise ValueError or KeyError if the tensors of a bundle are not there, or not cut as their parameter is."""
    for name, member in quantized.members.items():
        held = tensors[name]
        placement = member_placement(member, quantized.blocks, target.placement, target.shape, world_size)
        if held.shape != member_shape(member, quantized.blocks):
            raise ValueError(f"{name!r} has the shape {held.shape}, which does not follow {target.shape}")
        if held.placement != placement:
            raise ValueError(f"{name!r} is not cut as its parameter is")

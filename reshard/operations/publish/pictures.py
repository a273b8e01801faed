"""The pictures of a published repo: one for each resharded folder in it, beside the card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...resharded.manifest import Manifest
from ...showing.page.drawing import SVG_MARK, card_drawing
from .card import picture_name

__all__ = ["Drawn", "drawn", "is_drawn"]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A picture: its path in the repo, and its text."""

    name: str
    text: str


def drawn(manifests: Mapping[str, Manifest]) -> dict[str, Drawn]:
    """Draw every resharded folder of a repo, by its path. Of several whose names would be the same, the first is."""
    found: dict[str, Drawn] = {}
    for path, manifest in manifests.items():
        name = picture_name(path)
        if all(name != other.name for other in found.values()):
            found[path] = Drawn(name, card_drawing(manifest.to_dict()))
    return found


def is_drawn(text: str) -> bool:
    """Whether `reshard publish` drew a picture, so that it can be replaced."""
    return SVG_MARK in text

"""Versions of the manifest's format, and what a reader must know to read one.

2.0 is closed: whatever it does not have is in 3.0, which names in `requires` what it needs. So a folder that needs
nothing new is read by every release. A release that does not know a cut, a unit or a bundle refuses the folder, and
loads no wrong data in silence.

A later feature adds its name to `FEATURES`, and nothing else here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import VersionError
from ..files.untrusted import UnknownError, text
from ..text import listed, printable

if TYPE_CHECKING:
    from .manifest import Manifest

__all__ = ["CLOSED", "FEATURES", "OPEN", "check_known", "check_version", "version_members"]

CLOSED, OPEN = "2.0", "3.0"


def _has_subfolders(manifest: Manifest) -> bool:
    """A reader of 2.0 takes the name of a file in a folder for one that leads out, or the file for missing."""
    names = [record.name for record in manifest.files()] + [file["file"] for file in manifest.source_files]
    return any("/" in name for name in names)


def _has_copies(manifest: Manifest) -> bool:
    """A reader of 2.0 gives a tensor back to one source file, and refuses a manifest that has it in two."""
    names = [name for file in manifest.source_files for name in json.loads(file["header"]) if name != "__metadata__"]
    return len(set(names)) < len(names)


# What 3.0 can require: name → whether a manifest needs it. The writer names those that it does.
FEATURES: dict[str, Callable[[Manifest], bool]] = {"copies": _has_copies, "subfolders": _has_subfolders}

_FILE = {"file", "size", "digest", "tensors"}
# Every member of 2.0, by the way to the objects that have it. Those of placements are where placements are read, and a
# mesh may have no other axis in any version.
_MEMBERS = {
    (): {
        *("format", "format_version", "tool", "model", "mesh", "source", "parameters", "hooks", "custom_strategies"),
        *("tied", "duplicates", "dropped", "runtime_only", "digest", "ranks", "unused", "extras", "seal"),
    },
    ("model",): {"architecture", "model_type", "dtype"},
    ("source",): {"repo_id", "commit", "files"},
    ("source", "files"): {"file", "size", "digest", "header"},
    ("parameters",): {"name", "shape", "dtype", "style", "placement", "from", "compute_dtype", "reason"},
    ("ranks",): _FILE,
    ("unused",): _FILE,
    ("extras",): _FILE,
}
_AXES = {"tp", "ep"}


def version_members(manifest: Manifest) -> dict[str, Any]:
    """The members of a manifest that say how it is to be read: the lowest version that can hold it."""
    requires = sorted(name for name, needed in FEATURES.items() if needed(manifest))
    return {"format_version": OPEN, "requires": requires} if requires else {"format_version": CLOSED}


def check_version(version: Any, *, where: str) -> None:
    """Raises VersionError, which names both, where this release does not read that version of the format at all.

    A later 3.x is read, since `requires` says what it needs. So is a later 2.x, though nobody writes one, if it has no
    member that 2.0 has not (see `check_known`): what such a member means cannot be told, and it may be a cut.
    """
    major, _, minor = version.partition(".") if isinstance(version, str) else ("", "", "")
    if f"{major}.0" not in (CLOSED, OPEN) or not (minor.isascii() and minor.isdigit()):
        raise VersionError(
            f"{where}: format version {printable(version)}, this release reads {CLOSED} and {OPEN}",
            hint="upgrade reshard",
        )


def check_known(content: Mapping[str, Any]) -> None:
    """Raises UnknownError, which names it, where a manifest holds what this release cannot read.

    Raises ValueError, TypeError, KeyError or AttributeError where it is malformed.
    """
    if content["format_version"].startswith(OPEN[:2]):
        requires = content["requires"]
        if not isinstance(requires, list):
            raise ValueError("requires is no list")
        if unknown := sorted({text(name) for name in requires} - FEATURES.keys()):
            raise UnknownError(f"needs {listed(unknown)}")
    else:
        for way, members in _MEMBERS.items():
            for node in _nodes(content, way):
                if unknown := sorted(node.keys() - members):
                    raise UnknownError(f"has {'.'.join((*way, printable(unknown[0])))}")
    if unknown := sorted(content["mesh"].keys() - _AXES):
        raise UnknownError(f"has a mesh axis {printable(unknown[0])}")


def _nodes(node: Any, way: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The objects at the end of a way, through every item of a list."""
    if node is None:
        return
    for item in node if isinstance(node, list) else (node,):
        if way:
            yield from _nodes(item[way[0]], way[1:])
        else:
            yield item

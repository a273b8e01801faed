"""The versions of the manifest's format, and the checks that this release can read one.

2.0 is closed: a manifest that has anything more is 3.0, and names in `requires` what its reader needs. So every release
reads a folder that needs nothing new. A release that does not know a cut, a unit or a bundle refuses the folder
instead of loading wrong data in silence.

A new feature adds its name to `FEATURES`, and nothing else here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import VersionError
from ..files.untrusted import UnknownError, text
from ..sharding.placement import Nested, Ranges
from ..text import listed, printable

if TYPE_CHECKING:
    from .manifest import Manifest

__all__ = ["CLOSED", "FEATURES", "OPEN", "check_known", "check_version", "version_members"]

CLOSED, OPEN = "2.0", "3.0"


def _has_subfolders(manifest: Manifest) -> bool:
    """Whether a file is in a subfolder: a reader of 2.0 finds that its path leads out, or that the file is missing."""
    names = [record.name for record in manifest.files()] + [file["file"] for file in manifest.source_files]
    return any("/" in name for name in names)


def _has_copies(manifest: Manifest) -> bool:
    """Whether a tensor is in two source files: a reader of 2.0 gives it back to one, and refuses such a manifest."""
    names = [name for file in manifest.source_files for name in json.loads(file["header"]) if name != "__metadata__"]
    return len(set(names)) < len(names)


def _has_cuts(manifest: Manifest) -> bool:
    """Whether a parameter is cut otherwise than torch.chunk cuts: a reader of 2.0 has no word for that."""
    placements = (parameter.placement for parameter in manifest.parameters)
    return any(isinstance(one.outer if isinstance(one, Nested) else one, Ranges) for one in placements)


MANY = 1_000_000  # tensors of all rank files: with a name for each digest, a hundred megabytes of JSON


def _has_very_many(manifest: Manifest) -> bool:
    """Whether there are so many tensors that their names are in a table of their own."""
    return sum(len(record.tensors) for record in manifest.rank_files) > MANY


# The features that 3.0 can require: name → whether a manifest needs it. The writer names those that it needs.
FEATURES: dict[str, Callable[[Manifest], bool]] = {
    "bundles": lambda manifest: bool(manifest.bundles),
    "copies": _has_copies,
    "cuts": _has_cuts,
    "derived": lambda manifest: manifest.derived is not None,
    "engine": lambda manifest: manifest.engine is not None,
    "names": _has_very_many,
    "subfolders": _has_subfolders,
}

_FILE = {"file", "size", "digest", "tensors"}
# Every member of 2.0, by the path of keys to the objects that have it. `placement_json` has the members of placements.
# A mesh may have no other axis in any version.
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
    """Return the members that say how to read a manifest: the lowest version that can hold it."""
    requires = sorted(name for name, needed in FEATURES.items() if needed(manifest))
    return {"format_version": OPEN, "requires": requires} if requires else {"format_version": CLOSED}


def check_version(version: Any, *, where: str) -> None:
    """Raise VersionError, naming both versions, if this release does not read `version` of the format.

    A later 3.x is read, since `requires` says what it needs. A later 2.x, though nobody writes one, is read if it has
    only members of 2.0 (see `check_known`): nobody can tell what another member means, and it may be a cut.
    """
    major, _, minor = version.partition(".") if isinstance(version, str) else ("", "", "")
    if f"{major}.0" not in (CLOSED, OPEN) or not (minor.isascii() and minor.isdigit()):
        raise VersionError(
            f"{where}: format version {printable(version)}, this release reads {CLOSED} and {OPEN}",
            hint="upgrade reshard",
        )


def check_known(content: Mapping[str, Any]) -> None:
    """Raise UnknownError, naming it, if a manifest holds something that this release cannot read.

    Raise ValueError, TypeError, KeyError or AttributeError if it is malformed.
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
    """Yield the objects at the end of `way`, a path of keys that leads through every item of a list."""
    if node is None:
        return
    for item in node if isinstance(node, list) else (node,):
        if way:
            yield from _nodes(item[way[0]], way[1:])
        else:
            yield item

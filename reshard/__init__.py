"""Reshard a Hub checkpoint once, offline, into one safetensors file per tensor-parallel rank.

The commands call the functions of the same names: `convert`, `plan`, `export`, `inspect`, `verify`, `merge`, `publish`,
`pull`. They are imported when first used, so that importing this package, and asking for help, costs nothing. Each
raises a `ReshardError`; `reshard.errors` lists them all. `plan` returns a `ReshardPlan`; `convert`, `export` and
`inspect` return a `Manifest`. `convert_part` and `finish` make a folder in parts, on several machines. `sizes` is
`reshard plan` without a number of ranks.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import (
    BadInputError,
    BusyError,
    DestinationExistsError,
    IntegrityError,
    NetworkError,
    PolicyError,
    RemoteMovedError,
    ReshardError,
    StorageError,
    TopologyError,
    UsageError,
    VersionError,
)

if TYPE_CHECKING:
    from .operations.convert.convert import convert
    from .operations.convert.finish import finish
    from .operations.convert.part import PartReport, convert_part
    from .operations.export import export
    from .operations.inspect import inspect
    from .operations.merge import merge
    from .operations.plan import plan, sizes
    from .operations.publish.publish import publish
    from .operations.pull import pull
    from .operations.verify.verify import verify
    from .planning.plan import ReshardPlan
    from .resharded.manifest import Manifest

__all__ = [
    "BadInputError",
    "BusyError",
    "DestinationExistsError",
    "IntegrityError",
    "Manifest",
    "NetworkError",
    "PartReport",
    "PolicyError",
    "RemoteMovedError",
    "ReshardError",
    "ReshardPlan",
    "StorageError",
    "TopologyError",
    "UsageError",
    "VersionError",
    "__version__",
    "convert",
    "convert_part",
    "export",
    "finish",
    "inspect",
    "merge",
    "plan",
    "publish",
    "pull",
    "sizes",
    "verify",
]

_HOMES = {
    "Manifest": "resharded.manifest",
    "ReshardPlan": "planning.plan",
    "PartReport": "operations.convert.part",
    "convert": "operations.convert.convert",
    "convert_part": "operations.convert.part",
    "finish": "operations.convert.finish",
    "export": "operations.export",
    "plan": "operations.plan",
    "sizes": "operations.plan",
    "inspect": "operations.inspect",
    "merge": "operations.merge",
    "publish": "operations.publish.publish",
    "pull": "operations.pull",
    "verify": "operations.verify.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'reshard' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

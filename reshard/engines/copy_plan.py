"""Copy plans: what an engine's loader writes where, as a planner wrote it down.

A plan is JSON lines: one about the engine, then one for each rank. A rank's line has its `tensors`, name → [storage,
dtype, shape, offset, strides], and all `writes` into storages, in order: [storage, dtype, shape, offset, strides, kind,
...]. The view that is written to gets a "copy" of a view of another storage ([storage, dtype, offset, strides]), a
"constant" (its value), or what was "computed" (by which operation). Storages `s:NAME` are tensors of the checkpoint.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInputError, VersionError
from ..files.dtypes import CODES
from ..files.system import by_errno
from ..files.untrusted import count, counts, one_of, text
from ..resharded.manifest_json import engine_from_json
from ..sharding.views import View
from ..text import printable

__all__ = ["PLAN_NAME", "SOURCE", "Computed", "Constant", "CopyPlan", "Held", "RankPlan", "Write"]

PLAN_NAME = "reshard.copy-plan.gz"
SOURCE = "s:"  # how the storages of the checkpoint's tensors begin
_VERSION = 1
_LIMIT = 2 << 30  # bytes of a plan's text


@dataclass(frozen=True, slots=True)
class Held:
    """A view of a storage, and the dtype (torch's name) that its elements are taken for."""

    storage: str
    dtype: str
    view: View


@dataclass(frozen=True, slots=True)
class Constant:
    """One value, which fills a view."""

    value: float | int | bool


@dataclass(frozen=True, slots=True)
class Computed:
    """Values that an operation computed: no plan can give them."""

    operation: str


@dataclass(frozen=True, slots=True)
class Write:
    """What is written into a view of a storage."""

    into: Held
    what: Held | Constant | Computed


@dataclass(frozen=True, slots=True)
class RankPlan:
    """The tensors of one rank's file, by name, and all writes that fill them, in order. `backends` are the kernels that
    the engine chose for experts: some lay their weights out in shapes of their own."""

    tp: int
    pp: int
    backends: tuple[str, ...]
    tensors: dict[str, Held]
    writes: tuple[Write, ...]


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """A plan for all ranks: `engine` says of what engine it is, and for what. `text` is the plan as it was read."""

    engine: dict[str, Any]
    ranks: tuple[RankPlan, ...]
    text: bytes

    @classmethod
    def read(cls, path: Path) -> CopyPlan:
        """Read a plan's file, compressed or not.

        Raises:
            BadInputError: it cannot be read, or makes no sense.
            VersionError: a newer release wrote it.
        """
        name = printable(path)
        try:
            with open(path, "rb") as raw:
                packed = raw.read(2) == b"\x1f\x8b"
            with gzip.open(path, "rb") if packed else open(path, "rb") as opened:
                content = opened.read(_LIMIT + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise BadInputError(f"{name}: is damaged: {printable(error)}") from None
        except OSError as error:
            raise by_errno(error, f"{name}: cannot be read: {error.strerror}", BadInputError) from None
        if len(content) > _LIMIT:
            raise BadInputError(f"{name}: larger than {_LIMIT >> 30} GiB")
        try:
            lines = [json.loads(line) for line in content.splitlines()]
            if lines[0]["format"] != "copy plan":
                raise ValueError("not a copy plan")
            if lines[0]["version"] != _VERSION:
                raise VersionError(
                    f"{name}: version {printable(lines[0]['version'])} of copy plans, this release reads {_VERSION}",
                    hint="upgrade reshard, or make the plan again",
                )
            engine = engine_from_json(lines[0]["engine"])
            ranks = tuple(map(_rank, lines[1:]))
            expected = [(tp, pp) for pp in range(engine["pp"]) for tp in range(engine["tp"])]
            if [(rank.tp, rank.pp) for rank in ranks] != expected:
                raise ValueError(f"{len(ranks)} ranks for tp {engine['tp']}, pp {engine['pp']}")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            raise BadInputError(f"{name}: is no copy plan: {printable(error)}") from None
        return cls(engine, ranks, content)

    def packed(self) -> bytes:
        """Return the file's bytes, the same each time."""
        return gzip.compress(self.text, mtime=0)


def _rank(content: Mapping[str, Any]) -> RankPlan:
    tensors = {text(name): _held(*of) for name, of in content["tensors"].items()}
    backends = tuple(map(text, content["backends"]))
    writes = tuple(map(_write, content["writes"]))
    return RankPlan(count(content["tp"]), count(content["pp"]), backends, tensors, writes)


def _held(storage: Any, dtype: Any, shape: Any, offset: Any, strides: Any) -> Held:
    view = View(count(offset), counts(shape), counts(strides))
    if len(view.shape) != len(view.strides) or 0 in view.shape:
        raise ValueError(f"a view of shape {view.shape} with strides {view.strides}")
    return Held(text(storage), one_of(CODES, dtype), view)


def _write(content: list[Any]) -> Write:
    storage, dtype, shape, offset, strides, kind, *more = content
    into = _held(storage, dtype, shape, offset, strides)
    if kind == "copy":
        storage, dtype, offset, strides = more
        return Write(into, _held(storage, dtype, shape, offset, strides))
    if kind not in ("constant", "computed"):
        raise ValueError(f"a write of the kind {kind!r:.50}")
    (value,) = more
    if kind == "constant":
        if type(value) not in (int, float, bool):
            raise ValueError(f"a constant {value!r:.50}")
        return Write(into, Constant(value))
    return Write(into, Computed(text(value)))

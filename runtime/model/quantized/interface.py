"""What a library must do for its modules to compute with this rank's part of a quantized weight."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from reshard.resharded.targets import Target
from reshard.sharding.placement import Piece, local_shape, pieces
from reshard.text import printable
from reshard.transforms.bundle import Quantized, member_placement, member_shape

__all__ = ["Held", "Library", "Place", "mark_quantized"]


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's part of a quantized weight [out, in], seen before its tensors are there.

    `target` is the weight as the model has it, of the full shape. The source files call it `source`, and `metadata` is
    theirs.
    """

    target: Target
    source: str
    quantized: Quantized
    rank: int
    world_size: int
    metadata: Callable[[], Mapping[str, str]]

    @property
    def size(self) -> tuple[int, int]:
        """The shape of the whole weight, [out, in]."""
        rows, columns = self.target.shape
        return rows, columns

    @property
    def local(self) -> tuple[int, int]:
        """The shape of this rank's part, [out, in]."""
        rows, columns = local_shape(
            self.target.placement, self.target.shape, rank=self.rank, world_size=self.world_size
        )
        return rows, columns

    def pieces(self, role: str) -> list[Piece]:
        """Return where this rank's part of one of its tensors is in the whole tensor."""
        member = next(one for one in self.quantized.members.values() if one.role == role)
        blocks = self.quantized.blocks
        placement = member_placement(member, blocks, self.target.placement, self.target.shape, self.world_size)
        shape = member_shape(member, blocks)
        return list(pieces(placement, shape, rank=self.rank, world_size=self.world_size))


@dataclass(frozen=True, slots=True)
class Held:
    """A rank's part of a quantized weight, with its tensors by role, on the model's device."""

    place: Place
    tensors: Mapping[str, torch.Tensor]

    @property
    def options(self) -> Mapping[str, Any]:
        return self.place.quantized.options


def _nothing(*_: Any) -> None:
    return None


def _never(_: nn.Module) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Library:
    """A library whose own modules compute with quantized weights.

    `packages` are needed; `extra` is the extra of this package that brings them.
    `refusal` says why a rank's part cannot be computed with natively on a device, None if it can.
    `replace` puts the library's modules, on the meta device, in the place of plain ones, by their names.
    `fill` gives such a module this rank's tensors.
    `begin` readies a filled module for its first forward, in a model of a dtype. It leaves other modules as they are.
    `reduce` changes the forward of a module that has a part of the inputs only, so that it computes its part of what
    one process does. The mesh is over the ranks that have the other parts.
    `tensors` are those that a module holds in memory for its weight.
    `quantizes_inputs` tells whether a module does: rounding can then change its output by a step.
    `computes_in` is the dtype that one of its modules computes in, None if it is that of the inputs.
    """

    name: str
    extra: str
    packages: tuple[str, ...]
    formats: frozenset[str]
    refusal: Callable[[Place, torch.device], str | None]
    replace: Callable[[Any, Mapping[str, Place], Mapping[str, Any], torch.device], None]
    fill: Callable[[nn.Module, Held], None]
    tensors: Callable[[nn.Module], Iterable[torch.Tensor]]
    begin: Callable[[nn.Module, torch.dtype], None] = _nothing
    reduce: Callable[[nn.Module, DeviceMesh], None] = _nothing
    quantizes_inputs: Callable[[nn.Module], bool] = _never
    computes_in: Callable[[nn.Module], torch.dtype | None] = _nothing

    def missing(self) -> str | None:
        """Say which of its packages cannot be imported; None if all can."""
        for name in self.packages:
            logging.getLogger(name).setLevel(logging.ERROR)  # bitsandbytes warns at every int8 forward
            try:
                with contextlib.redirect_stdout(sys.stderr):  # some say something of themselves
                    importlib.import_module(name)
            except Exception as error:  # of any kind: what they need may be missing, or not fit
                if getattr(error, "name", None) == name:
                    return f"{name} is not installed: pip install 'reshard[{self.extra}]'"
                reason = str(error).partition("\n")[0] or type(error).__name__
                return f"{name} cannot be imported: {printable(reason)}"
        return None


def mark_quantized(model: Any, told: Mapping[str, Any]) -> None:
    """Mark a model as transformers' quantizers do. `told` is the quantization_config of config.json."""
    model.is_quantized = True
    model.config.quantization_config = dict(told)

"""The one process that a sharded model is compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from reshard.operations.reference import HALF, single_model

from ..model.quantized.single import computes_otherwise, native_model, quantizes_inputs, shaken

__all__ = ["Process"]

T = TypeVar("T")


class Process:
    """The single-process `model` of the checkpoint in `root`, or of one `derived` from it. Its weights are dequantised,
    unless libraries compute something else on the ranks: then they compute here too."""

    def __init__(self, ours: Any, root: Path, derived: Any) -> None:
        self._otherwise, self._dtype = computes_otherwise(ours), ours.dtype
        self._plain = partial(single_model, root, device=ours.device, derived=derived)
        self._native = partial(
            native_model, root, device=ours.device, derived=derived, names=ours._reshard_quantized.native
        )
        self.model = (self._native if self._otherwise else self._plain)(dtype=self._dtype)

    @property
    def rounds(self) -> bool:
        """Whether rounding explains more than EXACT."""
        return self._otherwise or self._dtype in HALF

    def again(self, run: Callable[[Any], T]) -> T:
        """Return what `run` makes of a model that differs by rounding: this one in fp32, or with a little noise where
        it quantizes its inputs. The model may be cast, so this comes last."""
        if self._dtype not in HALF and quantizes_inputs(self.model):
            with shaken(self.model):
                return run(self.model)
        return run(self._exact)

    @cached_property
    def _exact(self) -> Any:
        if not self._otherwise:
            return self.model.float()
        return (self._native if quantizes_inputs(self.model) else self._plain)(dtype=torch.float32)

    @property
    def weights(self) -> Any:
        """The model with plain weights."""
        return self._plain(dtype=self._dtype) if self._otherwise else self.model

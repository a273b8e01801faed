"""Modules that work on each token by itself (norms, dropout), each rank on its own tokens."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .base import LocalLayer
from .collectives import all_gather, split

__all__ = ["SequenceParallel"]

_SEQUENCE_DIM = 1  # of activations [batch, sequence, hidden]


class SequenceParallel(LocalLayer):
    """Parameters are whole; each rank runs its slice of the sequence, and the slices are gathered."""

    @staticmethod
    def _prepare_input_fn(
        input_layouts: Any, desired_input_layouts: Any, mod: nn.Module, inputs: tuple, device_mesh: DeviceMesh
    ) -> tuple:
        mod._sequence_length = inputs[0].shape[_SEQUENCE_DIM]
        return (split(inputs[0], _SEQUENCE_DIM, device_mesh), *inputs[1:])

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        return all_gather(outputs, _SEQUENCE_DIM, mod._sequence_length, device_mesh)

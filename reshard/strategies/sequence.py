"""Sequence parallelism: modules that work on a token by itself, and hidden states split along the sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..errors import BadInputError
from .base import LocalLayer
from .collectives import all_gather, chunk_bounds, reduce_scatter, split

__all__ = ["SequenceParallel", "SplitSequence", "follow", "split_sequence_of"]

_DIM = 1  # the sequence's dim in activations [batch, sequence, hidden]
_FOLLOWED = "_split_sequence"  # attribute of a module that returns or takes slices while the sequence is split


class SplitSequence:
    """A model's hidden states between its blocks: while `length` is set, each rank has its slice of `length` tokens.

    Slices are those of torch.chunk: later ranks may hold less, or nothing. Returned tensors are contiguous: models use
    `view`, and a slice must not keep the whole in memory.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        self.length: int | None = None

    def __deepcopy__(self, _memo: Any) -> SplitSequence:
        """Return self: a copied model has the hooks of the first, and these use this object."""
        return self

    def begin(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's slice of replicated hidden states. Fewer tokens than ranks stay replicated."""
        if x.ndim != 3 or x.shape[_DIM] < self._mesh.size():
            return x
        self.length = x.shape[_DIM]
        return self._slice(x)

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """Join the ranks' slices."""
        assert self.length is not None
        return all_gather(self.checked(x), _DIM, chunk_bounds(self.length, self._mesh.size()), self._mesh).contiguous()

    def end(self, x: torch.Tensor) -> torch.Tensor:
        """Join the ranks' slices, and end the split."""
        whole = self.whole(x)
        self.length = None
        return whole

    def reduced(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's slice of the sum of partial hidden states, of which each rank has all tokens."""
        return reduce_scatter(self._checked(x, self.length), _DIM, self._mesh).contiguous()

    def part(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's slice of replicated hidden states."""
        return self._slice(self._checked(x, self.length))

    def _slice(self, x: torch.Tensor) -> torch.Tensor:
        return split(x, _DIM, chunk_bounds(x.shape[_DIM], self._mesh.size()), self._mesh).contiguous()

    def checked(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`, this rank's slice. Raises BadInputError if it is not."""
        assert self.length is not None
        start, stop = chunk_bounds(self.length, self._mesh.size())[self._mesh.get_local_rank()]
        return self._checked(x, stop - start)

    def _checked(self, x: torch.Tensor, tokens: int | None) -> torch.Tensor:
        if x.ndim != 3 or x.shape[_DIM] != tokens:
            raise BadInputError(
                f"hidden states of shape {list(x.shape)}, where {tokens} of {self.length} tokens were expected",
                hint="the model mixes whole and split sequences: load it without sequence parallelism",
            )
        return x


def follow(module: nn.Module, sequence: SplitSequence) -> None:
    """Let a module's style know when the hidden states around it are split."""
    module.__dict__[_FOLLOWED] = sequence


def split_sequence_of(module: nn.Module) -> SplitSequence | None:
    """Return the `SplitSequence` that the module follows, if that is split now."""
    sequence = module.__dict__.get(_FOLLOWED)
    return sequence if sequence is not None and sequence.length is not None else None


class SequenceParallel(LocalLayer):
    """Parameters are replicated; each rank runs its slice of the sequence, and the slices are gathered.

    If the hidden states are split already, the module takes a slice and returns one.
    """

    @staticmethod
    def _prepare_input_fn(
        input_layouts: Any, desired_input_layouts: Any, mod: nn.Module, inputs: tuple, device_mesh: DeviceMesh
    ) -> tuple:
        if split_sequence_of(mod) is not None:
            return inputs
        mod._sequence_bounds = chunk_bounds(inputs[0].shape[_DIM], device_mesh.size())
        return (split(inputs[0], _DIM, mod._sequence_bounds, device_mesh), *inputs[1:])

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        if split_sequence_of(mod) is not None:
            return outputs
        return all_gather(outputs, _DIM, mod._sequence_bounds, device_mesh)

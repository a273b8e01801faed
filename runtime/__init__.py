"""Run a resharded model under torchrun: `load` gives a transformers model whose parameters are DTensors."""

from .loading import full_tensor, load

__all__ = ["full_tensor", "load"]

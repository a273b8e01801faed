"""Run a resharded model under torchrun: `load` gives a transformers model whose parameters are DTensors."""

from reshard.process import patient_collector

with patient_collector():
    from .kernels import sdpa
    from .loading import load
    from .replicas import gather, share
    from .whole import full_tensor

__all__ = ["full_tensor", "gather", "load", "sdpa", "share"]

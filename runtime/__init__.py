"""The Python interface under torchrun: `load` returns a transformers model whose parameters are DTensors."""

from reshard.process import patient_collector

with patient_collector():
    from .loading.load import load
    from .model.full_tensor import full_tensor
    from .model.kernels import sdpa
    from .model.shares import gather, share

__all__ = ["full_tensor", "gather", "load", "sdpa", "share"]

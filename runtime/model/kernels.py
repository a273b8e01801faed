"""The kernels that compute a forward: attention implementations, torch's attention kernels, compiled decoding."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from reshard.errors import ReshardError, UsageError
from reshard.launch.asked import check_attention_takes
from reshard.launch.options import SDPA_BACKENDS
from reshard.text import listed, printable

__all__ = [
    "SDPA_KERNELS",
    "check_attention",
    "check_attention_of",
    "check_compile",
    "check_sdpa",
    "check_sdpa_of",
    "compile_config",
    "compiler_errors",
    "sdpa",
    "shares_gpu",
]

SDPA_KERNELS = {name: getattr(SDPBackend, backend) for name, backend in SDPA_BACKENDS.items()}
_chosen: ContextVar[str | None] = ContextVar("kernel", default=None)
# Modes of torch.compile that capture CUDA graphs.
_GRAPH_MODES = ("reduce-overhead", "max-autotune")
# torch's message if none of the allowed kernels can compute a call, on CPU and on CUDA.
_NO_KERNEL = re.compile("No (viable backend|available kernel)")
# The package that holds each implementation; the package `kernels` can fetch one instead.
_PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn",
}


def check_attention(name: str | None, device: torch.device, dtype: str) -> None:
    """Raise UsageError if an attention implementation cannot run on this device in this dtype, for any model."""
    if name not in _PACKAGES:
        return
    if device.type != "cuda":
        raise UsageError(f"--attn {name} needs a GPU, and this is {device.type}", hint="use --attn sdpa")
    if not any(map(importlib.util.find_spec, (_PACKAGES[name], "kernels"))):
        raise UsageError(f"--attn {name}: the package {_PACKAGES[name]} is not installed", hint="use --attn sdpa")
    if dtype not in ("float16", "bfloat16"):
        raise UsageError(
            f"--attn {name} computes in float16 or bfloat16, and the folder is {dtype}",
            hint="use --attn sdpa, or convert with --dtype bfloat16",
        )


def check_attention_of(model_class: Any, name: str | None) -> None:
    """Raise UsageError if a model has no such attention implementation.

    Known are transformers' own, those registered with its `AttentionInterface`, and kernels on the Hub (`org/name`),
    which transformers fetches.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name is None or "/" in name:
        return
    known = ["eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in key)]
    if name not in known:
        raise UsageError(f"--attn {printable(name)} is not known; there are {listed(known, most=20)}")
    kind = "flash_attn" if name in _PACKAGES else "flex_attn" if name == "flex_attention" else name
    if not getattr(model_class, f"_supports_{kind}", True):
        raise UsageError(f"--attn {name}: {model_class.__name__} does not support it", hint="use --attn eager")


@contextlib.contextmanager
def sdpa(kernel: str | None) -> Iterator[None]:
    """Within this context, one of torch's kernels (SDPA_KERNELS) computes attention `sdpa`; any kernel if it is None.

    A forward that is compiled in the context keeps that kernel. `load` in the context refuses a model whose attention
    the kernel cannot compute.

    Raises UsageError if there is no such kernel, or it cannot compute a call: torch takes no other in its place.
    """
    if kernel is None:
        yield
        return
    if kernel not in SDPA_KERNELS:
        raise UsageError(f"--sdpa {printable(kernel)} is not known; there are {', '.join(SDPA_KERNELS)}")
    before = _chosen.set(kernel)
    try:
        with sdpa_kernel(SDPA_KERNELS[kernel]):
            yield
    except RuntimeError as error:
        if not _NO_KERNEL.match(str(error)):
            raise
        raise UsageError(
            f"--sdpa {kernel}: torch has no such kernel for this device, dtype and mask",
            hint="math runs everywhere",
        ) from None
    finally:
        _chosen.reset(before)


def check_sdpa(
    kernel: str | None,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 64,
    *,
    masked: bool = False,
) -> None:
    """Raise UsageError if a kernel cannot run on a device, for heads of `head_dim` elements of a dtype.

    With `masked`, try it with a mask, as a static cache and prompts of different lengths need: flash kernels on a GPU
    take none.
    """
    with sdpa(kernel):
        query = torch.zeros(1, 1, 8, head_dim, dtype=dtype, device=device)
        mask = torch.ones(1, 1, 8, 8, dtype=torch.bool, device=device) if masked else None
        torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)


def check_sdpa_of(model: Any, device: torch.device) -> None:
    """Raise UsageError if the kernel that `sdpa` has chosen, if any, cannot compute a model's attention on `device`.

    The model may still be on the meta device.
    """
    kernel = _chosen.get()
    if kernel is None:
        return
    check_attention_takes(kernel, model.config.get_text_config()._attn_implementation)
    sizes = {getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None) for module in model.modules()}
    for size in sorted(size for size in sizes if isinstance(size, int)):
        check_sdpa(kernel, device, model.dtype, size)


def shares_gpu(mesh: DeviceMesh) -> bool:
    """Whether ranks on GPUs use gloo. Its collectives leave the GPU, so no CUDA graph can hold them."""
    if mesh.device_type != "cuda" or mesh.size() == 1:
        return False
    backend: str = mesh.get_group()._get_backend(torch.device("cuda")).name()
    return backend == "gloo"


def check_compile(mode: str | None, model: Any) -> None:
    """Raise UsageError if a loaded model cannot be compiled in torch.compile's `mode`."""
    if mode in _GRAPH_MODES and shares_gpu(model._device_mesh):
        raise UsageError(
            f"--compile {mode} captures CUDA graphs, which the collectives of ranks that share a GPU cannot be part of",
            hint="use --compile default",
        )


def compile_config(mode: str) -> Any:
    """Return the `compile_config` for `model.generate` that compiles decoding steps in torch.compile's `mode`."""
    from transformers import CompileConfig

    config = CompileConfig(mode=mode)
    config._compile_all_devices = True  # on CPU too
    return config


@contextlib.contextmanager
def compiler_errors() -> Iterator[None]:
    """Raise torch.compile's errors as a ReshardError of one line, such as without a C++ compiler or Triton."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason, _, _ = str(getattr(error, "inner_exception", error)).strip().partition("\n")
        raise ReshardError(f"--compile: {printable(reason)}", hint="-v shows the traceback") from error

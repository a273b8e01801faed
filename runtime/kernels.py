"""Which kernels compute a forward: attention implementations, torch's own attention kernels, compiled decoding."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from reshard.errors import ReshardError, UsageError, listed, printable

__all__ = [
    "SDPA_KERNELS",
    "check_attention",
    "check_attention_of",
    "check_sdpa",
    "compile_config",
    "compiler_errors",
    "sdpa",
]

SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# What torch says when none of the kernels allowed can compute a call, on CPU and on CUDA.
_NO_KERNEL = re.compile("No (viable backend|available kernel)")
# Packages that bring an implementation; `kernels` fetches one instead.
_PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn",
}


def check_attention(name: str | None, device: torch.device, dtype: str) -> None:
    """Raise UsageError where an attention implementation cannot run on this device, whatever the model."""
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
    """Raise UsageError where a model has no such attention implementation.

    Known are transformers' own, those that were registered with its `AttentionInterface`, and kernels of the Hub
    (`org/name`), which transformers fetches.
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
    """While it lasts, attention `sdpa` is computed by one of torch's kernels (SDPA_KERNELS), or any where it is None.

    What is compiled meanwhile keeps that kernel.

    Raises UsageError where the kernel cannot compute a call: torch takes no other in its place.
    """
    if kernel is None:
        yield
        return
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


def check_sdpa(kernel: str | None, device: torch.device) -> None:
    """Raise UsageError where a kernel cannot run on a device at all."""
    with sdpa(kernel):
        query = torch.zeros(1, 1, 8, 64, dtype=torch.bfloat16, device=device)
        torch.nn.functional.scaled_dot_product_attention(query, query, query)


def compile_config(mode: str) -> Any:
    """What `model.generate` takes as `compile_config`, to compile decoding steps in torch.compile's `mode`."""
    from transformers import CompileConfig

    config = CompileConfig(mode=mode)
    config._compile_all_devices = True  # on CPU too
    return config


@contextlib.contextmanager
def compiler_errors() -> Iterator[None]:
    """Say in one line what torch.compile cannot do here, such as without a C++ compiler or Triton."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason, _, _ = str(getattr(error, "inner_exception", error)).strip().partition("\n")
        raise ReshardError(f"--compile: {printable(reason)}", hint="-v shows the traceback") from error

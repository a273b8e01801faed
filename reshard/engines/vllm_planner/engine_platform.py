"""The platform that is planned for, on a machine that may be another: vLLM's choices, without its kernels."""

from __future__ import annotations

import os
import re
import sys
from importlib.machinery import ModuleSpec
from typing import Any

COMPILED = ("_C", "_moe_C", "_C_cache_ops", "_vllm_fa2_C", "_vllm_fa3_C")  # the spaces of compiled operations
# What the compiled kernels answer when they are asked which GPUs they run on.
LEAST_CAPABILITY = {
    "cutlass_scaled_mm_supports_fp8": 89,
    "cutlass_scaled_mm_supports_block_fp8": 90,
    "cutlass_group_gemm_supported": 90,
    "cutlass_scaled_mm_supports_fp4": 100,
}


class Refusal(Exception):
    """Why there is no plan: one line."""


def stub_platform(request: dict[str, Any]) -> None:
    """Have vLLM choose as it does on the platform that is asked for, on a machine that is another."""
    if request["platform"] != "cuda":
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so vLLM leaves Triton on, though no driver is active
    sys.meta_path.insert(0, NoKernels())
    import torch
    import vllm.platforms as platforms
    from torch import library
    from vllm.platforms.interface import DeviceCapability

    major, minor = request["capability"]
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    class Stub(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(major, minor)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "a GPU"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 << 30

        @classmethod
        def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
            return True

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

        @classmethod
        def device_count(cls) -> int:
            return int(request["tp"] * request["pp"])

        @classmethod
        def check_if_supports_dtype(cls, dtype: Any) -> None:
            return None

    platforms._current_platform = Stub()
    for space in COMPILED:
        setattr(torch.ops, space, NoKernel(space))
    platforms.vllm_version_matches_substr = lambda word: False  # its build for CPUs would turn Triton off
    torch.cuda.Stream, torch.cuda.Event = Waiting, Waiting
    torch.cuda.current_device = lambda: 0
    register = library.register_fake

    def register_fake(operation: Any, function: Any = None, /, **named: Any) -> Any:
        if str(operation).partition("::")[0] in COMPILED:
            return function or (lambda fake: fake)
        return register(operation, function, **named)

    library.register_fake = register_fake


class Waiting:
    """In place of a GPU's streams and events, which need a GPU to be made."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass


class NoKernel:
    """A compiled operation that is there, and is never run; or the space of them."""

    def __init__(self, name: str) -> None:
        self.__name__ = self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in LEAST_CAPABILITY:
            return lambda capability: capability >= LEAST_CAPABILITY[name]
        return NoKernel(f"{self._name}.{name}")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        raise Refusal(f"the engine runs {self._name}, a kernel, when it loads weights")


class NoKernels:
    """Give empty modules for the engine's compiled ones, which do not load where their platform is not. The others, for
    single kinds of attention and the like, may be missing: the engine does without."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        compiled = re.fullmatch(r"vllm(\.\w+)*\._(vllm_fa\d_|moe_)?C(_\w+)?", name)
        return ModuleSpec(name, self) if compiled else None  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> Any:
        return None

    def exec_module(self, module: Any) -> None:
        return None


def platform_of(request: dict[str, Any]) -> dict[str, Any]:
    """Return what a plan says of its platform: the one that was asked for, or this machine's."""
    from vllm.platforms import current_platform

    if request["platform"]:
        return {"platform": request["platform"], "capability": request["capability"]}
    found = current_platform.get_device_capability()
    capability = [found.major, found.minor] if found else None
    return {"platform": str(current_platform.device_type), "capability": capability}

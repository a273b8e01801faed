"""Write down where vLLM puts every element of a checkpoint, without any weights.

This file runs in an environment that has vLLM, which need not have `reshard`:

    python -P -s vllm_planner.py FOLDER

FOLDER holds `request.json`, which says what is asked for and has the names, dtypes and shapes of the checkpoint's
tensors, and `model/`, its small files. The answer is `FOLDER/plan.jsonl`: a line about the engine, then one for each
rank. See `reshard.engines.copy_plan` for what they hold.

vLLM's own classes are built on the meta device, and its own `load_weights` is run on tensors that have no elements. A
dispatch mode sees every operation. Nothing is computed and no kernel is built.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
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


def main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text())
    stub_platform(request)
    import torch
    import vllm

    config = engine_config(folder / "model", request)
    init_groups(config)
    lines = [
        {
            "format": "copy plan",
            "version": 1,
            "engine": {
                "name": "vllm",
                "version": vllm.__version__,
                "platform": request["platform"] or platform_name(),
                "capability": request["capability"],
                "tp": request["tp"],
                "pp": request["pp"],
                "ep": request["ep"],
                "dtype": str(config.model_config.dtype).removeprefix("torch."),
                "architecture": config.model_config.architectures[0],
                "quantization": config.model_config.quantization,
                "moe_backend": request["moe_backend"],
            },
        }
    ]
    for pp in range(request["pp"]):
        for tp in range(request["tp"]):
            lines.append(plan_of_rank(config, request, tp, pp))
    lines[0]["engine"]["torch"] = torch.__version__  # type: ignore[index]
    part = folder / "plan.part"
    part.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    part.rename(folder / "plan.jsonl")


# The engine


def stub_platform(request: dict[str, Any]) -> None:
    """Have vLLM choose as it does on the platform that is asked for, on a machine that is another."""
    if request["platform"] != "cuda":
        return
    sys.meta_path.insert(0, NoKernels())
    import torch
    import vllm.platforms as platforms
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
    register = torch.library.register_fake

    def register_fake(operation: Any, function: Any = None, /, **named: Any) -> Any:
        if str(operation).partition("::")[0] in COMPILED:
            return function or (lambda fake: fake)
        return register(operation, function, **named)

    torch.library.register_fake = register_fake


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
    """Give empty modules for the engine's compiled ones, which do not load where their platform is not."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        compiled = re.fullmatch(r"vllm(\.\w+)*\._\w*C(_stable\w*)?", name)
        return ModuleSpec(name, self) if compiled else None  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> Any:
        return None

    def exec_module(self, module: Any) -> None:
        return None


def platform_name() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def engine_config(model: Path, request: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    chosen = {"moe_backend": request["moe_backend"]} if request["moe_backend"] else {}
    args = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        dtype=request["dtype"] or "auto",
        load_format="dummy",
        enforce_eager=True,
        enable_expert_parallel=request["ep"],
        trust_remote_code=False,
        **chosen,
    )
    config = args.create_engine_config()
    parallel = config.parallel_config
    parallel.tensor_parallel_size, parallel.pipeline_parallel_size = request["tp"], request["pp"]
    parallel.world_size = request["tp"] * request["pp"]
    config.model_config.verify_with_parallel_config(parallel)
    return config


def init_groups(config: Any) -> None:
    """Make the engine's groups, of this process alone."""
    import tempfile

    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    parallel = config.parallel_config
    meant = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.world_size
    parallel.tensor_parallel_size = parallel.pipeline_parallel_size = parallel.world_size = 1
    with set_current_vllm_config(config), tempfile.TemporaryDirectory(dir=".") as folder:
        init_distributed_environment(1, 0, f"file://{Path(folder).resolve()}/meet", 0, backend="gloo")
        initialize_model_parallel(1, 1, backend="gloo")
    parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.world_size = meant


def be_rank(config: Any, tp: int, pp: int) -> None:
    """Have the engine take this process for one of its ranks."""
    from vllm.distributed import parallel_state as state

    parallel = config.parallel_config
    sizes = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    parallel.rank = pp * sizes[0] + tp
    for group, at, size in ((state.get_tp_group(), tp, sizes[0]), (state.get_pp_group(), pp, sizes[1])):
        group.ranks = list(range(size))
        group.world_size, group.rank_in_group, group.rank = size, at, at
    experts = getattr(state, "_EP", None)
    if experts is not None:
        experts.ranks = list(range(sizes[0]))
        experts.world_size, experts.rank_in_group, experts.rank = sizes[0], tp, tp
    config.compilation_config.static_forward_context.clear()


# The trace


class Trace:
    """What is known of every storage: where its elements come from, in the order of the operations."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.kept: list[Any] = []  # storages that must not be freed, as their addresses are keys
        self.writes: list[list[Any]] = []

    def name(self, tensor: Any, called: str | None = None) -> str:
        """Return the name of a tensor's storage; it is a temporary one unless it is `called` otherwise."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.names or called:
            self.names[key] = called or f"t:{len(self.names)}"
            self.kept.append(storage)
        return self.names[key]

    def knows(self, tensor: Any) -> bool:
        return tensor.untyped_storage()._cdata in self.names

    def record(self, into: Any, what: list[Any]) -> None:
        if into.numel():
            self.writes.append([self.name(into), *described(into), *what])

    def leading_to(self, names: set[str]) -> list[list[Any]]:
        """Return the writes into storages of these names, and into all that these were copied from, in order."""
        found: list[list[Any]] = []
        for write in reversed(self.writes):
            if write[0] in names:
                found.append(write)
                if write[5] == "copy":
                    names.add(write[6])
        return found[::-1]

    def copied(self, into: Any, source: Any) -> None:
        source = source.expand(into.shape)
        dtype, _, offset, strides = described(source)
        self.record(into, ["copy", self.name(source), dtype, offset, strides])

    def constant(self, into: Any, value: Any) -> None:
        self.record(into, ["constant", value])

    def computed(self, into: Any, operation: str) -> None:
        self.record(into, ["computed", operation])


def described(tensor: Any) -> tuple[str, list[int], int, list[int]]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return dtype, list(tensor.shape), tensor.storage_offset(), list(tensor.stride())


def mode_of(trace: Trace) -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    made = {"zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1}
    empty = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}
    filled = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            space, _, name = func._schema.name.partition("::")
            result = func(*args, **kwargs)
            if name == "copy_":
                trace.copied(args[0], args[1])
            elif name == "fill_":
                value = args[1]
                if not isinstance(value, torch.Tensor):
                    trace.constant(args[0], value)
                elif value.device.type != "meta":
                    trace.constant(args[0], value.item())
                else:
                    trace.copied(args[0], value)
            elif name == "zero_":
                trace.constant(args[0], 0)
            elif name in made:
                trace.constant(result, made[name])
            elif name in filled:
                trace.constant(result, args[filled[name]] if len(args) > filled[name] else kwargs["fill_value"])
            elif name in empty:
                pass
            elif name in ("clone", "_to_copy", "lift_fresh", "detach", "alias") or name.endswith("_copy"):
                if not shares(result, args[0]):
                    self.bring(result, args[0])
            elif name in ("cat", "stack"):
                joined(trace, result, args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0), name == "stack")
            else:
                inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
                outputs = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
                changes = func._schema.is_mutable
                for one in outputs:
                    if changes or not any(shares(one, other) for other in inputs):
                        trace.computed(one, f"{space}.{name}")
            return result

        def bring(self, result: Any, source: Any) -> None:
            """Note what a new tensor is a copy of; a number from the host is a constant."""
            if source.device.type != "meta" and not trace.knows(source):
                if source.numel() == 1:
                    trace.constant(result, source.item())
                else:
                    trace.computed(result, "values from the host")
            else:
                trace.copied(result, source)

    return Mode()


def shares(one: Any, other: Any) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def joined(trace: Trace, result: Any, parts: Any, dim: int, stacked: bool) -> None:
    at = 0
    for part in parts:
        if stacked:
            trace.copied(result.select(dim, at), part)
            at += 1
        elif part.numel():
            trace.copied(result.narrow(dim, at, part.shape[dim]), part)
            at += part.shape[dim]


def constants_of_host(trace: Trace) -> Any:
    """See `torch.tensor(1.0)` under the meta device, of which no operation tells the number; and keep tables of whole
    numbers off it."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Numbers(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func in (torch.full, torch.arange) and kwargs.get("dtype") in (torch.int32, torch.int64):
                kwargs = {"device": "cpu", **kwargs}  # a table, of which expert is where: its numbers are asked for
            result = func(*args, **kwargs)
            number = func is torch.tensor and args and isinstance(args[0], (int, float, bool))
            if number and result.device.type == "meta":
                trace.constant(result, args[0])
            return result

    return Numbers()


def plan_of_rank(config: Any, request: dict[str, Any], tp: int, pp: int) -> dict[str, Any]:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    be_rank(config, tp, pp)
    trace = Trace()

    def tensors() -> Iterator[tuple[str, Any]]:
        for name, (dtype, shape) in request["tensors"].items():
            with torch.utils._python_dispatch._disable_current_modes():
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            trace.name(tensor, f"s:{name}")
            yield name, tensor

    with set_current_vllm_config(config), mode_of(trace):
        with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"), constants_of_host(trace):
            model = initialize_model(config, model_config=config.model_config)
        model.load_weights(tensors())
    found = {name: tensor for name, tensor in model.state_dict().items() if tensor.numel()}
    backends = {
        value.name.lower()
        for module in model.modules()
        for value in vars(getattr(module, "quant_method", None) or object).values()
        if isinstance(value, Enum) and type(value).__name__.lower().endswith("moebackend")
    }
    held = {name: [trace.name(tensor), *described(tensor)] for name, tensor in without_aliases(found).items()}
    return {
        "tp": tp,
        "pp": pp,
        "backends": sorted(backends),
        "tensors": held,
        "writes": trace.leading_to({str(of[0]) for of in held.values()}),
    }


def without_aliases(tensors: dict[str, Any]) -> dict[str, Any]:
    """Leave out what the engine's `_filter_subtensors` does: tensors inside others, and further names of one."""
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        start = tensor.storage_offset() * tensor.element_size()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        end = start + (last + 1) * tensor.element_size()
        spans.setdefault(tensor.untyped_storage()._cdata, []).append((start, end, name))
    kept = {}
    for name, tensor in tensors.items():
        group = spans[tensor.untyped_storage()._cdata]
        start, end = next((low, high) for low, high, one in group if one == name)
        hidden = any(
            tensors[other].is_contiguous()
            and low <= start
            and end <= high
            and ((low, high) != (start, end) or not tensor.is_contiguous() or other < name)
            for low, high, other in group
            if other != name
        )
        if not hidden:
            kept[name] = tensor
    return kept


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except Refusal as error:
        print(error, file=sys.stderr)
        sys.exit(3)

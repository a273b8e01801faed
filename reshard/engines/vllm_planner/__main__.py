"""Write down where vLLM puts every element of a checkpoint, without any weights.

This folder is a program for an environment that has vLLM, which need not have `reshard`:

    python -P -s vllm_planner FOLDER

FOLDER holds `request.json`, which says what is asked for and has the names, dtypes and shapes of the checkpoint's
tensors, and `model/`, its small files. The answer is `FOLDER/plan.jsonl`: a line about the engine, then one for each
rank. See `reshard.engines.copy_plan` for what they hold.

vLLM's own classes are built on the meta device, and its own `load_weights` is run on tensors that have no elements. A
dispatch mode sees every operation. Nothing is computed and no kernel is built.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from copy_trace import Trace, described, mode_of, numbers_of_host
from engine_platform import Refusal, platform_of, stub_platform
from engine_ranks import be_rank, engine_config, init_groups


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
                **platform_of(request),
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
        with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"), numbers_of_host(trace):
            model = initialize_model(config, model_config=config.model_config)
        before = layout_of(model)
        with numbers_of_host(trace):
            model.load_weights(tensors())
    if layout_of(model) != before:  # the loader of rank files meets the model as it is built
        raise Refusal("the engine changes its model while it loads weights, so its rank files cannot be foretold")
    backends = {
        value.name.lower()
        for module in model.modules()
        for value in vars(getattr(module, "quant_method", None) or object).values()
        if isinstance(value, Enum) and type(value).__name__.lower().endswith("moebackend")
    }
    held = {name: [trace.name(tensor), *described(tensor)] for name, tensor in tensors_of(model).items()}
    return {
        "tp": tp,
        "pp": pp,
        "backends": sorted(backends),
        "tensors": held,
        "writes": trace.leading_to({str(of[0]) for of in held.values()}),
    }


def tensors_of(model: Any) -> dict[str, Any]:
    return without_aliases({name: tensor for name, tensor in model.state_dict().items() if tensor.numel()})


def layout_of(model: Any) -> dict[str, Any]:
    return {name: described(tensor)[:2] for name, tensor in tensors_of(model).items()}


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
    main(Path(sys.argv[1]))

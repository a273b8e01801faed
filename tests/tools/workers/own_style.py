"""A style whose module sees DTensors: its forward compiles as one graph, and sees values assigned to parameters.

own_style.py make SOURCE OUT    cut a llama for 2 ranks with that style
own_style.py run OUT BACKEND    under torchrun; any difference is an assertion, hence a non-zero exit
"""

import os
import sys
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

import reshard
import runtime
from reshard.sharding.placement import Placement, Shard
from reshard.strategies import ALL_PARALLEL_STYLES, TensorParallelLayer


class OnDTensors(TensorParallelLayer):
    """A strategy that splits output features, which DTensor gathers after the module."""

    def placement(self, param_type: str, shape: Any) -> Placement:
        return Shard(max(len(shape) - 2, 0))

    @staticmethod
    def _prepare_input_fn(_layouts: Any, _desired: Any, _mod: nn.Module, inputs: tuple, device_mesh: Any) -> tuple:
        return (DTensor.from_local(inputs[0], device_mesh, [Replicate()], run_check=False), *inputs[1:])

    @staticmethod
    def _prepare_output_fn(_layouts: Any, _local: bool, _mod: nn.Module, outputs: Any, device_mesh: Any) -> Any:
        return outputs.redistribute(device_mesh, [Replicate()]).to_local()


ALL_PARALLEL_STYLES.register_strategy("on_dtensors", OnDTensors())


def make(source: str, out: str) -> None:
    gathered = dict.fromkeys(("mlp.up_proj", "mlp.gate_proj"), "on_dtensors")
    plan = {"extends": "auto", **gathered, "mlp.down_proj": "rowwise_split_input"}
    reshard.convert(source, out, tp_size=2, sync=False, tp_plan=plan)


def run(out: str, backend: str) -> None:
    model, ids = runtime.load(out), torch.arange(3, 20)[None]
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        before = model(ids).logits
        torch.testing.assert_close(compiled(ids).logits, before, rtol=1e-5, atol=1e-5)
        for name, parameter in model.named_parameters():
            if "up_proj" in name:
                parameter.data = parameter.data * 2
        after = model(ids).logits
        assert (after - before).abs().max() > 0.1
        torch.testing.assert_close(compiled(ids).logits, after, rtol=1e-5, atol=1e-5)
    whole = runtime.full_tensor(model, "model.layers.0.mlp.up_proj.weight")
    assert torch.equal(whole, dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"].full_tensor())


{"make": make, "run": run}[sys.argv[1]](*sys.argv[2:])
sys.stdout.flush()
os._exit(0)  # gloo's threads can abort the interpreter while it shuts down, when all is done

"""Run under torchrun: load every folder of a list with its sequence split, and write down what the models compute.

    sequence.py JOBS.json OUT

JOBS is a list of {"name", "folder", "inputs", "counted"}; "inputs" is a file of a list of the forward's arguments. Rank
R writes OUT.R: {name: {"outputs": those of each, by `sequence_tools.outputs`, "norms": the tokens that each norm of a
layer gets in the first forward, "hidden": shapes of the hidden states}}. If "counted", it also writes
"calls": {"split", "whole", "step": collectives by operator}, of the first forward with the sequence split, the same
with a model loaded without, and a step of decoding. A copy of the first model must compute the same.
"""

import copy
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sequence_tools import outputs
from torch.utils._python_dispatch import TorchDispatchMode

import runtime
from reshard.strategies import collectives

collectives._SMALL = 0  # a small sum is done by gathering, and would be counted as that


class Counting(TorchDispatchMode):
    """Counts collectives by the name of their operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


def collectives_of(model: Any, **inputs: Any) -> dict[str, int]:
    with Counting() as mode:
        model(**inputs)
    return dict(mode.calls)


def tokens_of_norms(model: Any, **inputs: Any) -> dict[str, int]:
    seen = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].shape[1]}))
        for name, module in model.named_modules()
        if name.endswith(("input_layernorm", "post_attention_layernorm"))
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def main(jobs: str, out: str) -> None:
    results = {}
    for job in json.loads(Path(jobs).read_text()):
        model = runtime.load(job["folder"], sequence_parallel=True)
        inputs = torch.load(job["inputs"])
        first, step = inputs[0], {"input_ids": inputs[0]["input_ids"][:, :1]}
        with torch.inference_mode():
            computed = [outputs(model, arguments) for arguments in inputs]
            hidden = model(**first, output_hidden_states=True).hidden_states  # runs without splitting the sequence
            found = results[job["name"]] = {
                "outputs": computed,
                "norms": tokens_of_norms(model, **first),
                "hidden": [tuple(one.shape) for one in hidden],
            }
            if job["counted"]:
                found["calls"] = {
                    "split": collectives_of(model, **first),
                    "whole": collectives_of(runtime.load(job["folder"]), **first),
                    "step": collectives_of(model, **step),
                }
            if len(results) == 1:
                assert torch.equal(copy.deepcopy(model)(**first).logits, computed[0]["logits"])
    torch.save(results, f"{out}.{dist.get_rank()}")
    dist.barrier()


main(*sys.argv[1:])
os._exit(0)  # gloo's threads can abort the interpreter while it shuts down, when all is done

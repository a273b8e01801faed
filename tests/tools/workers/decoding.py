"""Run under torchrun: other ways to decode must give the same tokens.

    decoding.py SOURCE FOLDER GATHERS BACKEND

Greedy decoding with GATHERS "once" gathers the logits in the first forward only, with "always" in each. The forward is
one graph, and a step with a static cache is compiled no more often than the unsharded model's. Any difference is an
assertion, hence a non-zero exit.
"""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from compiling import leave_guards_as_they_are
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, StaticCache

import runtime
from reshard.strategies import linear
from runtime.generation.generate import CACHE, greedy

NEW = 8


def greedy_tokens(model: torch.nn.Module, ids: torch.Tensor, gathers: str) -> torch.Tensor:
    calls = {"all_gather": 0, "largest_only": 0}

    def counted(name: str) -> None:
        real = getattr(linear, name)

        def count(*arguments: object) -> torch.Tensor:
            calls[name] += 1
            return real(*arguments)

        setattr(linear, name, count)

    originals = linear.all_gather, linear.largest_only
    counted("all_gather")
    counted("largest_only")
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    steps = expected.shape[1] - ids.shape[1]
    assert steps > 2
    assert calls == {"all_gather": steps, "largest_only": 0}
    tokens = greedy(model, ids, NEW)
    joined = 1 if gathers == "once" else steps
    assert calls == {"all_gather": steps + joined, "largest_only": steps - joined}, calls
    linear.all_gather, linear.largest_only = originals
    assert torch.equal(tokens, expected)
    model.generation_config.repetition_penalty = 1.3  # greedy, but not on the logits as they are
    penalized = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(greedy(model, ids, NEW), penalized)
    model.generation_config.repetition_penalty = None
    return tokens


class Batched(TorchDispatchMode):
    """How often a weight of the head's shape is one of a batch: torch copies it before it multiplies."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._shape = (*model.get_output_embeddings().weight.shape[::-1],)
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default and tuple(args[1].shape[1:]) == self._shape:
            self.count += 1
        return func(*args, **(kwargs or {}))


def last_token(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """The logits of a prompt's last token alone cost no copy of the head's weight, at any batch size."""
    for batch in (1, 2):
        with torch.no_grad(), Batched(model) as batched:
            model(ids[:batch], logits_to_keep=1)
        assert not batched.count


def one_graph(model: torch.nn.Module, ids: torch.Tensor, backend: str) -> None:
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def static_cache(model: torch.nn.Module, ids: torch.Tensor, backend: str) -> tuple[torch.Tensor, int]:
    """Return the tokens of a compiled forward, step by step, and how many times a step was compiled."""
    torch.compiler.reset()
    compilations = 0

    def counting(graph: torch.fx.GraphModule, inputs: list) -> Any:
        nonlocal compilations
        compilations += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    step = torch.compile(model, fullgraph=True, backend=counting)
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + NEW)
    out = model(ids, **{CACHE: cache}, use_cache=True)
    found = [ids, out.logits[:, -1:].argmax(-1)]
    for end in range(ids.shape[1], ids.shape[1] + NEW - 1):
        position = torch.full((len(ids), 1), end)
        out = step(found[-1], **{CACHE: cache}, use_cache=True, position_ids=position)
        found.append(out.logits[:, -1:].argmax(-1))
    return torch.cat(found, 1), compilations


def main(source: str, folder: str, gathers: str, backend: str) -> None:
    leave_guards_as_they_are()
    model = runtime.load(folder)
    model.generation_config.eos_token_id = None  # so that all rows have equally many tokens
    ids = torch.arange(3, 11).repeat(2, 1)
    with torch.inference_mode():
        tokens = greedy_tokens(model, ids, gathers)
        options = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": "static"}
        assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options), tokens)
    last_token(model, ids)
    with torch.no_grad():
        one_graph(model, ids, backend)
        told: list[Any] = [None]
        if dist.get_rank() == 0:
            told = [static_cache(AutoModelForCausalLM.from_pretrained(source).eval(), ids, backend)]
        dist.broadcast_object_list(told)
        expected, graphs = told[0]
        found, ours = static_cache(model, ids, backend)
    assert torch.equal(expected, tokens)
    assert torch.equal(found, tokens)
    assert ours == graphs, f"{ours} compilations, of the unsharded model {graphs}"
    if dist.get_rank() == 0:
        print("all ways agree", flush=True)
    dist.barrier()


main(*sys.argv[1:])
os._exit(0)  # gloo's threads can abort the interpreter while it shuts down, when all is done

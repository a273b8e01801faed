"""Changes to a loaded model: its forward and its saved files have them, or one line refuses them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from places import WORKERS
from torchrun_tools import on_ranks, torchrun
from transformers.pytorch_utils import Conv1D

import reshard
import runtime
from reshard.errors import UsageError
from reshard.strategies.linear import Conv1DRowwiseParallel

KEEPS = "a loaded model keeps its parameters and modules"
REFUSED = {
    "swapped tensors": "model.embed_tokens.weight: the forward computes with another tensor than the parameter holds",
    "other dtype": "lm_head.weight: the forward computes with another tensor than the parameter holds",
    "other rows": "lm_head.weight: the forward computes with another tensor than the parameter holds",
    "whole weight": "lm_head.weight: its data is a DTensor, torch.float32 of [130, 32]",
    "vector": "model.embed_tokens.weight: its data is a DTensor",
    "functional call": f"model.norm.weight: {KEEPS}",
    "attribute": f"model.norm.weight: {KEEPS}",
    "no bias": f"model.layers.0.self_attn.o_proj.bias: {KEEPS}",
    "deleted": f"model.norm.weight: {KEEPS}",
    "registered": f"model.norm.bias: {KEEPS}",
    "assigned state dict": "load_state_dict(assign=True) replaces parameters",
    "whole state dict": "lm_head.weight: a loaded model's is a DTensor, and this state_dict has a Tensor",
    "backward to inputs": "a loaded model runs inference only: gradients",
    "input embeddings": f"model.embed_tokens: {KEEPS}",
    "output embeddings": f"lm_head: {KEEPS}",
    "resized": "resize_token_embeddings gives a model other parameters",
    "padded": "resize_token_embeddings gives a model other parameters",
    "adapter": "add_adapter gives a model other parameters",
    "pruned": f"lm_head.weight_orig: {KEEPS}",
    "normed": f"lm_head.weight: {KEEPS}",
    "layers": f"model.layers: {KEEPS}",
    "a layer": f"model.layers.0: {KEEPS}",
    "head": f"lm_head: {KEEPS}",
    "training": "a loaded model runs inference only",
    "training of a module": "a loaded model runs inference only",
}
SEEN = {"data", "data in place", "data of modules", "state dict", "all in turn", "ties", "evaluation"}
SEEN |= {"gradients asked for", "as many tokens"}
IDS = torch.arange(5)[None]


def refusals(source: Path, room: Path, *names: str) -> dict[str, str | None]:
    reshard.convert(source, room / "out", tp_size=2, sync=False)
    done = on_ranks(2, str(WORKERS / "changes.py"), str(source), str(room / "out"), str(room), *names)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_change_is_seen_or_refused(tmp_path: Path) -> None:
    source = pico.save("llama", tmp_path / "source", attention_bias=True)
    found = refusals(source, tmp_path)
    assert {name for name, refusal in found.items() if refusal is None} == SEEN
    for name, words in REFUSED.items():
        refusal = found[name]
        assert refusal is not None, name
        assert refusal.startswith(words), (name, refusal)
        assert "\n" not in refusal


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"tie_word_embeddings": True}), ("phi3", {})],  # DTensor cannot express phi3's packed weights
)
def test_what_is_assigned_is_seen_in_other_layouts(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = pico.save(family, tmp_path / "source", **options)
    names = sorted({"data", "data of modules", "all in turn", "ties"})
    assert refusals(source, tmp_path, *names) == dict.fromkeys(names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("changes")
    reshard.convert(pico.save("llama", root / "source"), root / "out", tp_size=1, sync=False)
    return root / "out"


BACKWARDS: dict[str, Callable[[Any], torch.Tensor]] = {
    "a loss": lambda model: model(IDS, labels=IDS).loss,
    "logits": lambda model: model(IDS).logits.logsumexp(-1).sum(),
    "logits, changed in place": lambda model: model(IDS).logits.div_(2).sum(),
    "a part of them": lambda model: model(IDS).logits[:, -1].max(),
    "hidden states": lambda model: model(IDS, output_hidden_states=True).hidden_states[1].sum(),
    "inputs of one's own": lambda model: model(
        inputs_embeds=torch.randn(1, 5, 32).requires_grad_()  # behind the layers it would lack the other ranks' part
    ).logits.sum(),
    "a parameter": lambda model: (model.lm_head.weight.requires_grad_(), model(IDS).logits.sum())[1],
}


@pytest.mark.parametrize("name", BACKWARDS)
def test_a_backward_says_that_it_is_not_for_this(name: str, folder: Path) -> None:
    loss = BACKWARDS[name](runtime.load(folder))
    with pytest.raises(UsageError, match="a loaded model runs inference only: gradients") as found:
        loss.backward()
    assert "train the checkpoint" in str(found.value.hint)


def test_a_forward_without_gradients_gives_plain_tensors(folder: Path) -> None:
    model = runtime.load(folder)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert model(IDS).logits.grad_fn is None
            assert model(IDS).logits.numpy().shape == (1, 5, 130)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_what_is_assigned_is_seen_by_a_compiled_forward(backend: str, folder: Path) -> None:
    model = runtime.load(folder)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        before = compiled(IDS).logits
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.2
        after = model(IDS).logits
        assert not torch.allclose(before, after)
        torch.testing.assert_close(compiled(IDS).logits, after)


def test_a_module_that_sees_dtensors_is_compiled_and_sees_what_is_assigned(tmp_path: Path) -> None:
    source, worker = pico.save("llama", tmp_path / "source"), str(WORKERS / "own_style.py")
    subprocess.run([sys.executable, worker, "make", str(source), str(tmp_path / "out")], check=True, timeout=120)
    done = torchrun(2, worker, "run", str(tmp_path / "out"), "aot_eager")
    assert done.returncode == 0, done.stderr


def test_a_bias_that_is_added_behind_the_sum_is_not_written_to_unheard() -> None:
    """gpt2's module shows zeros instead: a write to it would reach no other rank and no file."""
    module = Conv1D(4, 8)
    with torch.no_grad():
        module.bias.fill_(3)
    Conv1DRowwiseParallel().prepare_module_tp(module, Any)
    assert torch.equal(module.bias, torch.zeros(4))
    with pytest.raises(RuntimeError, match="single memory location"), torch.no_grad():
        module.bias.add_(1)


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: runtime.full_tensor(model, "weight"),
        lambda model: runtime.share(model, ["a"]),
        lambda model: runtime.gather(model, ["a"]),
    ],
)
def test_a_model_of_somebody_else_is_told_so(ask: Callable[[Any], Any]) -> None:
    with pytest.raises(UsageError, match="this Linear is not a model that was loaded by this runtime"):
        ask(torch.nn.Linear(2, 2))


def test_a_copy_keeps_its_own(folder: Path) -> None:
    model = runtime.load(folder)
    copied = copy.deepcopy(model)
    with torch.inference_mode():
        before = model(IDS).logits
        for parameter in copied.parameters():
            parameter.mul_(1.5)
        assert torch.equal(model(IDS).logits, before)
        assert not torch.equal(copied(IDS).logits, before)
    for one in (model, copied):
        with pytest.raises(UsageError, match=rf"model\.norm\.weight: {KEEPS}"):
            one.model.norm.weight = torch.nn.Parameter(torch.ones(32))

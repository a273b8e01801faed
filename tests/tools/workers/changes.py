"""Run under torchrun: a change to a loaded model must reach its forward and what it saves, or be refused.

    changes.py SOURCE FOLDER ROOM [CHANGE …]

Each change is made to the loaded model and to the single-process one. A difference between them is an assertion, hence
a non-zero exit, unless the change was refused. Rank 0 prints as JSON why each was refused, or null.
"""

import copy
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import prune, vector_to_parameters
from transformers import AutoModelForCausalLM

import runtime
from reshard.errors import UsageError

IDS = torch.arange(3, 20)[None]


def data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.2


def data_in_place(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.2)


def data_of_modules(model: Any) -> None:
    for module in model.modules():
        for name in ("weight", "bias"):
            if getattr(module, name, None) is not None:
                getattr(module, name).data = getattr(module, name).data * 1.2
    for name, parameter in model.named_parameters():  # of parameters that their modules do not show
        if name.endswith("bias") and getattr(model.get_submodule(name.removesuffix(".bias")), "bias", None) is None:
            parameter.data = parameter.data * 1.2


def state_dict(model: Any) -> None:
    model.load_state_dict({name: tensor * 1.2 for name, tensor in model.state_dict().items()})


def swapped(model: Any) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        state_dict(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def two_rounds(model: Any) -> None:
    data(model)
    data_in_place(model)
    data_of_modules(model)


def other_dtype(model: Any) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data.double()


def other_rows(model: Any) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data[:-1]


def whole_weight(model: Any) -> None:
    dict(model.named_parameters())["lm_head.weight"].data = torch.zeros(130, 32)


def from_vector(model: Any) -> None:
    vector_to_parameters(torch.ones(sum(p.numel() for p in model.parameters())), model.parameters())


def functional(model: Any) -> None:
    torch.func.functional_call(model, {"model.norm.weight": torch.full((32,), 3.0)}, (IDS,))


def attribute(model: Any) -> None:
    model.model.norm.weight = nn.Parameter(torch.ones(32))


def no_bias(model: Any) -> None:
    model.model.layers[0].self_attn.o_proj.bias = None


def backward_to_inputs(model: Any) -> None:
    embeds = torch.randn(1, 5, 32).requires_grad_()
    assert torch.equal(model(inputs_embeds=embeds).logits, model(inputs_embeds=embeds.detach()).logits)
    model(inputs_embeds=embeds).logits.sum().backward()


CHANGES: dict[str, Callable[[Any], object]] = {
    "data": data,
    "data in place": data_in_place,
    "data of modules": data_of_modules,
    "state dict": state_dict,
    "all in turn": two_rounds,
    "ties": lambda model: model.tie_weights(),
    "evaluation": lambda model: model.eval().train(False),
    "gradients asked for": lambda model: model.requires_grad_(True),
    "as many tokens": lambda model: model.resize_token_embeddings(130),
    "swapped tensors": swapped,
    "other dtype": other_dtype,
    "other rows": other_rows,
    "whole weight": whole_weight,
    "vector": from_vector,
    "functional call": functional,
    "attribute": attribute,
    "no bias": no_bias,
    "deleted": lambda model: delattr(model.model.norm, "weight"),
    "registered": lambda model: model.model.norm.register_parameter("bias", nn.Parameter(torch.zeros(32))),
    "assigned state dict": lambda model: model.load_state_dict(model.state_dict(), assign=True),
    "whole state dict": lambda model: model.load_state_dict({"lm_head.weight": torch.zeros(130, 32)}, strict=False),
    "backward to inputs": backward_to_inputs,
    "input embeddings": lambda model: model.set_input_embeddings(nn.Embedding(130, 32)),
    "output embeddings": lambda model: model.set_output_embeddings(nn.Linear(32, 130, bias=False)),
    "resized": lambda model: model.resize_token_embeddings(170, mean_resizing=False),
    "padded": lambda model: model.resize_token_embeddings(None, pad_to_multiple_of=64),
    "adapter": lambda model: model.add_adapter(None),
    "pruned": lambda model: prune.random_unstructured(model.lm_head, "weight", 0.5),
    "normed": lambda model: nn.utils.parametrizations.weight_norm(model.lm_head),
    "layers": lambda model: setattr(model.model, "layers", model.model.layers[:1]),
    "a layer": lambda model: model.model.layers.__delitem__(0),
    "head": lambda model: setattr(model, "lm_head", nn.Linear(32, 130)),
    "training": lambda model: model.train(),
    "training of a module": lambda model: model.model.layers[0].train(),
}


# Changes that nothing can stop: afterwards a forward and a save are refused.
STOPPED = {"swapped tensors", "other dtype", "other rows"}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def same(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert found.shape == expected.shape, what
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max(), what


def change(name: str, source: str, folder: str, room: Path) -> str | None:
    """Return why a change was refused; None if the loaded model then did the same as the single-process one."""
    loaded, single = runtime.load(folder), AutoModelForCausalLM.from_pretrained(source).eval()
    before = logits(loaded)
    try:
        CHANGES[name](loaded)
        found = logits(loaded)
    except UsageError as error:
        if name in STOPPED:
            stays_refused(loaded, error.message, room)
        else:
            assert torch.equal(logits(loaded), before), f"{name}: refused, and the forward is another"
        return error.message
    CHANGES[name](single)
    expected = logits(single)
    same(found, expected, name)
    loaded.save_pretrained(room / name)
    dist.barrier()
    same(logits(AutoModelForCausalLM.from_pretrained(room / name).eval()), expected, f"{name}: saved")
    whole = runtime.full_tensor(loaded, "model.embed_tokens.weight")
    assert torch.allclose(whole, single.model.embed_tokens.weight), f"{name}: full_tensor"
    copied = copy.deepcopy(loaded)
    data(copied)
    same(logits(loaded), expected, f"{name}: a copy of it is another model")
    data(single)
    same(logits(copied), logits(single), f"{name}: the copy, changed")
    return None


def stays_refused(loaded: Any, message: str, room: Path) -> None:
    steps: list[Callable[[], object]] = [
        lambda: logits(loaded),
        lambda: loaded.save_pretrained(room / "refused"),
        loaded.state_dict,
        lambda: runtime.full_tensor(loaded, "model.norm.weight"),
    ]
    for step in steps:
        again = None
        try:
            step()
        except UsageError as error:
            again = error.message
        assert again == message, f"went on though {message}"


def main(source: str, folder: str, room: str, *names: str) -> None:
    refused = {name: change(name, source, folder, Path(room)) for name in names or CHANGES}
    if dist.get_rank() == 0:
        print(json.dumps(refused), flush=True)
    dist.barrier()


main(*sys.argv[1:])
os._exit(0)  # gloo's threads can abort the interpreter while it shuts down, when all is done

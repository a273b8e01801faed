"""Equal tokens on every rank: rank 0 decides whatever could differ between ranks."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from transformers import InfNanRemoveLogitsProcessor

from ..model.methods import give_method
from .argmax import joins_logits
from .texts import Stops

__all__ = ["by_name", "generate_alike"]


def generate_alike(model: Any, group: ProcessGroup) -> None:
    """Make `model.generate` one decision of all ranks, which must call it with the same arguments.

    A rank that chose another token, or stopped at another moment, would leave the others in a collective. So each call
    begins with rank 0's random state, and samples what one process with that state would. Only rank 0 reads the clock
    (`max_time`) and asks the caller's own `stopping_criteria`. Logits are rank 0's if they may differ in their last
    bits: if each rank computes them by itself, or if the caller's own processors change them. The rest is arithmetic
    on the same numbers.
    """
    own, signature = type(model).generate, inspect.signature(model.generate)

    @functools.wraps(own)
    def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
        args, call = by_name(signature, args, kwargs)
        _share_random_state(model.device, group)
        _share_the_end(model, call, group)
        processors = call.get("logits_processor") or []
        if processors or call.get("prefix_allowed_tokens_fn") or not joins_logits(model):
            call["logits_processor"] = [*processors, _FirstRanksLogits(group)]
        return own(model, *args, **call)

    give_method(model, "generate", generate)


def by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the call's arguments by name wherever they have one: a criterion may be the fourth of `generate`'s."""
    call = dict(signature.bind(*args, **kwargs).arguments)
    unnamed: tuple[Any, ...] = ()
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            unnamed = call.pop(name, ())
        elif parameter.kind is parameter.VAR_KEYWORD:
            call |= call.pop(name, {})
    return unnamed, call


def _share_random_state(device: torch.device, group: ProcessGroup) -> None:
    """Take over rank 0's random state on the device that samples."""
    on_gpu = device.type == "cuda"
    state = (torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()).to(device)
    dist.broadcast(state, group=group, group_src=0)
    if on_gpu:
        torch.cuda.set_rng_state(state.cpu(), device)
    else:
        torch.set_rng_state(state)


def _share_the_end(model: Any, call: dict[str, Any], group: ProcessGroup) -> None:
    """Let only rank 0 ask the stopping criteria that do not follow from the tokens alone."""
    from transformers import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria

    pure = (EosTokenCriteria, MaxLengthCriteria, StopStringCriteria, Stops)
    criteria = list(call.get("stopping_criteria") or ())
    configs = (call.get("generation_config"), model.generation_config)  # in the order in which transformers asks them
    said = (call.get("max_time"), *(getattr(config, "max_time", None) for config in configs))
    seconds = next((value for value in said if value is not None), None)
    if seconds is not None:
        call["max_time"] = None
        criteria.append(MaxTimeCriteria(seconds))
    if criteria:
        call["stopping_criteria"] = [c if isinstance(c, pure) else _FirstRanksWord(c, group) for c in criteria]


class _FirstRanksWord:
    """A stopping criterion that only rank 0 asks."""

    def __init__(self, criterion: Any, group: ProcessGroup) -> None:
        self._criterion = criterion
        self._group = group

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.uint8, device=input_ids.device)
        if self._group.rank() == 0:
            done += torch.as_tensor(self._criterion(input_ids, scores, **options)).to(done)
        dist.broadcast(done, group=self._group, group_src=0)
        return done.bool()


class _FirstRanksLogits(InfNanRemoveLogitsProcessor):
    """A logits processor that returns rank 0's logits on every rank.

    Some models' `generate` admits only certain classes of transformers, which work on the scores alone. This one does
    so too, and is a subclass of one of them.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.contiguous()
        dist.broadcast(scores, group=self._group, group_src=0)
        return scores

"""The command `generate` of a rank: continue prompts, a file of prompts, or a chat."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
import torch

from reshard.checkpoint.architecture import quiet_transformers
from reshard.launch.asked import check_generation
from reshard.launch.options import generate_options

from ..generation.generate import Decoding, Generated, Memory, generate_texts
from ..generation.limits import Limits, check_decoding
from ..generation.prompts import Prompt, chat_turns, in_chat, load_tokenizer, of_first_rank, plain, read_prompts
from ..model.kernels import check_compile, check_sdpa, sdpa
from ..model.shares import gather, replicas_of, share
from .options import is_first, load_model, say

__all__ = ["generate"]

_Continue = Callable[[Sequence[Prompt]], list[Generated]]


@click.command()
@generate_options
def generate(
    out: str,
    prompts: tuple[str, ...],
    file: str | None,
    chat: bool,
    seed: int | None,
    batch_size: int,
    style: str,
    kernel: str | None,
    **options: Any,
) -> None:
    """Continue prompts. `reshard run` runs this on each rank.

    \b
    Examples:
      torchrun --no-python --nproc-per-node 2 reshard-rank generate llama-tp2 --prompt "Once upon a time"
      torchrun --no-python --nproc-per-node 2 reshard-rank generate llama-tp2 --chat --max-new-tokens 500
    """
    check_generation(click.get_current_context().params)
    how = Decoding(**{name: options.pop(name) for name in Decoding.__slots__})
    if file is not None:
        prompts = (*prompts, *read_prompts(file, options["timeout"]))
    if how.temperature > 0 and seed is None:
        seed = of_first_rank(lambda: secrets.randbits(32), options["timeout"])
    with sdpa(kernel), quiet_transformers():
        model = load_model(out, kernel=kernel, **options)
        check_decoding(model)
        check_compile(how.compiled, model)
        if how.cache == "static" or how.compiled:
            check_sdpa(kernel, model.device, model.dtype, masked=True)
        tokenizer = load_tokenizer(model.name_or_path, chat=chat)
        limits = Limits.of(model)
        made = [in_chat(tokenizer, [_message("user", text)]) if chat else plain(tokenizer, text) for text in prompts]
        limits.check(made)
        if how.compiled == "reduce-overhead" and model.device.type == "cpu":
            say("Note: reduce-overhead captures CUDA graphs, which a CPU has not; compiled as by default", err=True)
        replicas = replicas_of(model)
        if seed is not None:  # equal on all ranks of a replica, different between replicas
            torch.manual_seed(seed + replicas.index)
        streams = style == "text" and len(prompts) < 2
        memory = Memory() if chat and not prompts else None

        def go_on(batch: Sequence[Prompt]) -> list[Generated]:
            own = share(model, batch)
            with _as_it_comes(_beginning(model, batch[0])) if streams else contextlib.nullcontext() as emit:
                mine = generate_texts(model, tokenizer, own, how, emit=emit, memory=memory) if own else []
            found = gather(model, mine) or []
            for one in [] if streams else found:
                say(json.dumps(_record(one, seed)) if style == "json" else _whole(model, one))
            return mine

        if chat and not prompts:
            _converse(tokenizer, limits, how.max_new_tokens, options["timeout"], go_on)
        at_once = batch_size * replicas.count
        for start in range(0, len(made), at_once):
            go_on(made[start : start + at_once])


def _converse(tokenizer: Any, limits: Limits, most: int, timeout: float, go_on: _Continue) -> None:
    """Answer turn by turn, in at most `most` new tokens. Forget the oldest turns, with a note, if positions run out.

    They run out if fewer are left for an answer than both `most` and a quarter of all. Then turns are forgotten until
    half of the positions are free, so that this does not happen again at the next turn.
    """
    messages: list[dict[str, str]] = []
    positions = limits.room(0)
    for turn in chat_turns(timeout):
        messages.append(_message("user", turn))
        prompt = in_chat(tokenizer, messages)
        if len(messages) > 1 and limits.room(len(prompt.ids)) < min(most, positions // 4):
            while len(messages) > 1 and limits.room(len(prompt.ids)) < positions // 2:
                del messages[:2]
                prompt = in_chat(tokenizer, messages)
            full = f"the conversation has outgrown the model's {limits.prompt} positions"
            say(f"Note: {full}; its beginning is forgotten", err=True)
        [answer] = go_on([prompt])
        messages.append(_message("assistant", answer.text))


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@contextlib.contextmanager
def _as_it_comes(beginning: str) -> Iterator[Callable[[str], None] | None]:
    """Give a function that prints text piece by piece on rank 0, after `beginning`; end the line even on failure."""
    begun = False

    def emit(text: str) -> None:
        nonlocal begun
        click.echo(text if begun else beginning + text, nl=False)
        begun = True

    if not is_first():
        yield None
        return
    try:
        yield emit
        if not begun:
            emit("")
    finally:
        if begun:
            click.echo()


def _beginning(model: Any, prompt: Prompt) -> str:
    """Return the text to print before the new text: the prompt, if the new text continues it."""
    return "" if prompt.chat or model.config.is_encoder_decoder else prompt.text


def _whole(model: Any, one: Generated) -> str:
    """Return a text among others, and an empty line. A prompt that it does not continue is on a line before it."""
    return (_beginning(model, one.prompt) or f"> {one.prompt.text}\n") + one.text + "\n"


def _record(one: Generated, seed: int | None) -> dict[str, Any]:
    counts = {"prompt_tokens": len(one.prompt.ids), "new_tokens": one.new_tokens, "ended": one.ended}
    sampled = {} if seed is None else {"seed": seed}
    return {"prompt": one.prompt.text, "text": one.text, **counts, **sampled}

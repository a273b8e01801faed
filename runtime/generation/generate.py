"""Generation of text with transformers' own `generate` on the loaded model, on every rank, with equal tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput

from reshard.checkpoint.architecture import decoding_as_told, quiet_transformers

from ..model import kernels
from .argmax import argmax_only
from .limits import Limits, check_decoding
from .prompts import Prompt, as_batch
from .texts import Stops, Stream, before_stop, continuation

__all__ = ["CACHE", "Decoding", "Generated", "Memory", "generate_texts", "greedy"]

# transformers' name of the KV cache, as an argument and in outputs: since 5.24 it warns of the old name.
CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"
# Fields of generation_config.json that are overridden: one text for each prompt, and nothing else but the cache.
_ONE_TEXT = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": True}
_ONE_TEXT |= dict.fromkeys(["output_scores", "output_logits", "output_attentions", "output_hidden_states"], False)
# Fields that are cleared: drafting tokens makes the same text, and stop texts are searched here.
_NOT_TAKEN = ("stop_strings", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


@dataclass(frozen=True, slots=True)
class Decoding:
    """Options of decoding. If one is None, the folder's generation_config.json decides, else transformers' default.

    Temperature 0 is greedy. A text ends before the first of `stops`, which replace the file's if there are any.
    `compiled` is a mode of torch.compile.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    stops: tuple[str, ...] = ()
    cache: str | None = None
    compiled: str | None = None


@dataclass(frozen=True, slots=True)
class Generated:
    """The continuation of a prompt. `ended` is why no more came: eos, stop or length."""

    prompt: Prompt
    text: str
    new_tokens: int
    ended: str


class Memory:
    """The KV cache of a conversation so far: the next turn continues it if it begins with the same tokens.

    A cache is never shortened, since not every kind allows that. So if the tokenizer now splits a turn's beginning
    otherwise, the turn is computed from its first token, as without a memory. The same holds for every turn if a layer
    has a recurrent state: given several tokens, some families (bamba, jamba) reset that state.
    """

    _KINDS = (DynamicLayer, DynamicSlidingWindowLayer)

    def __init__(self) -> None:
        self._ids: tuple[int, ...] = ()
        self._cache: Any = None

    def recall(self, ids: tuple[int, ...]) -> Any:
        """Return the cache of the first of `ids`, or None. `generate` extends it: `keep` it again afterwards."""
        known, cache, self._cache = self._ids, self._cache, None
        return cache if len(known) < len(ids) and ids[: len(known)] == known else None

    def keep(self, ids: tuple[int, ...], cache: Any) -> None:
        """Keep a cache of all `ids` but the last, which no forward has seen. A cache of an unknown kind is not kept."""
        known = type(cache) is DynamicCache and all(type(layer) in self._KINDS for layer in cache.layers)
        if known and cache.get_seq_length() == len(ids) - 1:
            self._ids, self._cache = ids[:-1], cache


def greedy(model: Any, ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
    """Continue token ids `[batch, length]` greedily by at most `max_new_tokens`. Return prompt and continuation.

    Raises BadInputError if transformers cannot decode as the folder's generation_config.json says.
    """
    with torch.inference_mode(), decoding_as_told(model), argmax_only(model):
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    how: Decoding,
    *,
    emit: Callable[[str], object] | None = None,
    memory: Memory | None = None,
) -> list[Generated]:
    """Continue a batch of prompts. Call it on every rank; all get the same.

    `emit` is called with the text of a single prompt as it comes. `memory` is for a single prompt that is the next turn
    of a conversation; a static cache starts anew each turn. A text ends where the model's positions end.

    Raises:
        UsageError: the model makes no text.
        BadInputError: a prompt is longer than the model's positions, or the folder asks for another kind of decoding.
        ReshardError: the model cannot be compiled here.
    """
    check_decoding(model)
    limits = Limits.of(model)
    limits.check(prompts)
    found: dict[int, Generated] = {}
    for rows in _together([limits.room(len(prompt.ids)) for prompt in prompts], how.max_new_tokens):
        batch = [prompts[row] for row in rows]
        found |= zip(rows, _go_on(model, tokenizer, batch, how, limits, emit, memory if len(prompts) == 1 else None))
    return [found[row] for row in range(len(prompts))]


def _together(rooms: Sequence[int], most: int) -> list[list[int]]:
    """Return each batch's prompt numbers. A prompt with too little room is alone: it would end other texts early."""
    free = [row for row, room in enumerate(rooms) if room >= most]
    return [*([free] if free else []), *([row] for row, room in enumerate(rooms) if room < most)]


def _go_on(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    how: Decoding,
    limits: Limits,
    emit: Callable[[str], object] | None,
    memory: Memory | None,
) -> list[Generated]:
    """Continue a batch of prompts that all have room for the new tokens, or of one prompt."""
    decoder_only = not model.config.is_encoder_decoder
    texts = how.stops or _stops_of(model)
    pad = next((i for i in (tokenizer.pad_token_id, *_eos(model)) if i is not None and limits.knows(i)), 0)
    ids, mask = as_batch(prompts, pad=pad, left=decoder_only, device=model.device)
    start = ids.shape[1] if decoder_only else 1  # where new tokens begin in `generate`'s result
    before = [prompt.ids if decoder_only else () for prompt in prompts]
    new = min(how.max_new_tokens, limits.room(ids.shape[1]))
    options = {**_options(how, model), "max_new_tokens": new, "pad_token_id": pad}
    if emit is not None:
        options["streamer"] = Stream(tokenizer, texts, emit)
    stops = Stops(tokenizer, texts, before, start) if texts else None
    if stops:
        options["stopping_criteria"] = [stops]
    if not decoder_only or options.get("cache_implementation") not in (None, "dynamic") or _rope_moves(model, ids):
        memory = None
    if memory and (past := memory.recall(prompts[0].ids)) is not None:
        options |= {CACHE: past, "cache_implementation": None}
    shortcut = contextlib.nullcontext() if options["do_sample"] else argmax_only(model)
    with torch.inference_mode(), quiet_transformers(), kernels.compiler_errors(), decoding_as_told(model), shortcut:
        made = model.generate(ids, attention_mask=mask, **options)
    tokens = made.sequences
    if memory:
        memory.keep(tuple(tokens[0].tolist()), made.get(CACHE))
    found = []
    for row, (prompt, tail) in enumerate(zip(prompts, tokens[:, start:].tolist())):
        count, ended = _end(tail, _eos(model), stops.ends[row] if stops else None)
        text = continuation(tokenizer, before[row], tail[:count])
        found.append(Generated(prompt, before_stop(text, texts), count, ended))
    return found


def _options(how: Decoding, model: Any) -> dict[str, Any]:
    options: dict[str, Any] = {**_ONE_TEXT, "do_sample": how.temperature > 0, "disable_compile": not how.compiled}
    options |= {name: None for name in _NOT_TAKEN if hasattr(model.generation_config, name)}
    if how.temperature > 0:
        given = {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k}
        options |= {name: value for name, value in given.items() if value is not None}
    if how.cache:
        options["cache_implementation"] = how.cache
    if how.compiled:
        options |= {"cache_implementation": "static", "compile_config": kernels.compile_config(how.compiled)}
    return options


def _eos(model: Any) -> list[int]:
    eos = model.generation_config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _stops_of(model: Any) -> tuple[str, ...]:
    """Return the stop texts of the folder's generation_config.json."""
    said = getattr(model.generation_config, "stop_strings", None) or ()
    return tuple(filter(None, [said] if isinstance(said, str) else said))


def _rope_moves(model: Any, ids: torch.Tensor) -> bool:
    """Whether `ids` are so long that longrope uses other frequencies, for all positions, than for shorter ids."""
    said = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [said, *(part for part in said.values() if isinstance(part, dict))]
    long = [kind for kind in kinds if kind.get("rope_type") == "longrope"]
    return any(ids.shape[1] > kind["original_max_position_embeddings"] for kind in long)


def _end(new: Sequence[int], eos: Sequence[int], stopped: int | None) -> tuple[int, str]:
    """Return how many of a row's new tokens are its own (padding follows), and why no more came."""
    ends = [(stopped, "stop")] if stopped is not None else []
    ends += [(count, "eos") for count, token in enumerate(new, 1) if token in eos][:1]
    return min(ends, default=(len(new), "length"))

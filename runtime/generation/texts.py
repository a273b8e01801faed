"""Decoding of new tokens to text: piece by piece as they come, up to a stop text, or all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["Stops", "Stream", "before_stop", "continuation"]

# Tokens of the prompt that are decoded with the first new ones: a token's text depends on the tokens before it.
_CONTEXT = 6


def continuation(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """Return the text that `new` tokens add to a prompt."""
    context = _context(tokenizer, prompt)
    before = tokenizer.decode(context, skip_special_tokens=True)
    return tokenizer.decode([*context, *new], skip_special_tokens=True)[len(before) :]


def _context(tokenizer: Any, prompt: Sequence[int]) -> list[int]:
    """Return the end of a prompt, from the start of a character: after half a one, some decoders spoil the rest too."""
    length = _CONTEXT
    while tokenizer.decode(found := list(prompt[-length:]), skip_special_tokens=True).startswith("\ufffd"):
        if length >= len(prompt):
            break
        length *= 2
    return found


def before_stop(text: str, stops: Sequence[str]) -> str:
    """Return `text` up to the first stop text: the one that is complete first as tokens come."""
    found = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(found)[1]] if found else text


class _Growing:
    """The text of tokens that come one by one."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = _context(tokenizer, prompt)
        self._begin = 0  # where the decoded window begins
        self._told = len(self._ids)  # text up to here was returned

    def add(self, ids: Sequence[int], *, last: bool = False) -> str:
        """Return the text that `ids` add; none while the last character lacks bytes, unless these are the `last`."""
        self._ids += ids
        known, text = (self._decode(self._ids[self._begin : end]) for end in (self._told, None))
        if len(text) <= len(known) or (text.endswith("\ufffd") and not last):
            return ""
        self._begin, self._told = self._told, len(self._ids)
        return text[len(known) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class Stream:
    """A streamer for `model.generate`: passes on one prompt's new text as it comes, up to a stop text."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], emit: Callable[[str], object]) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._emit = emit
        self._growing: _Growing | None = None
        self._held = ""  # possibly the beginning of a stop text
        self._over = False

    def put(self, tokens: torch.Tensor) -> None:
        ids = tokens.flatten().tolist()
        if self._growing is None:
            self._growing = _Growing(self._tokenizer, ids)
        else:
            self._tell(self._growing.add(ids))

    def end(self) -> None:
        if self._growing is not None:
            self._tell(self._growing.add([], last=True), last=True)

    def _tell(self, text: str, *, last: bool = False) -> None:
        if self._over:
            return
        text = self._held + text
        told = before_stop(text, self._stops)
        self._over = len(told) < len(text)
        if not self._over and not last:
            told = told[: len(told) - _overlap(told, self._stops)]
        self._held = text[len(told) :]
        if told:
            self._emit(told)


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of `text` may begin a stop text."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


class Stops:
    """A stopping criterion for `model.generate`: a row ends as soon as its new text contains a stop text.

    Unlike transformers' own, it searches neither the prompt nor the vocabulary. `ends` has each row's number of new
    tokens by then, None if its text contains no stop text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompts: Sequence[Sequence[int]], start: int) -> None:
        self.ends: list[int | None] = [None] * len(prompts)
        self._stops = stops
        self._growing = [_Growing(tokenizer, prompt) for prompt in prompts]
        self._tails = [""] * len(prompts)
        self._start = self._seen = start
        self._longest = max(map(len, stops))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        for row, ids in enumerate(input_ids[:, self._seen :].tolist()):
            text = self._tails[row] + self._growing[row].add(ids)
            if self.ends[row] is None and any(stop in text for stop in self._stops):
                self.ends[row] = input_ids.shape[1] - self._start
            self._tails[row] = text[-self._longest :]
        self._seen = input_ids.shape[1]
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device)

"""Limits of a model's decoding: whether it makes text at all, its positions and its vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reshard.errors import BadInputError, UsageError
from reshard.text import printable

from .prompts import Prompt

__all__ = ["Limits", "check_decoding"]

_ENDLESS = 1 << 62
_NAMED_BY = 20  # characters of a prompt that identify it in an error
# Fields of a generation_config.json that ask for another search, or for a prompt other than the user's.
_OTHER_WAYS = ("penalty_alpha", "dola_layers", "constraints", "force_words_ids", "token_healing")
# Fields that this package reads before transformers does; the type of the value, or of each in a list; and its words.
_READ_HERE = (
    ("eos_token_id", int, "a token's number, or a list of them"),
    ("stop_strings", str, "a text, or a list of them"),
)


def check_decoding(model: Any) -> None:
    """Check that the model can continue text, token by token.

    Raises:
        UsageError: the model makes no text, or not from text.
        BadInputError: its generation_config.json asks for something else.
    """
    name = type(model).__name__
    if not model.can_generate():
        raise UsageError(f"{name} does not generate text", hint="`check` and `bench` run its forward")
    if model.main_input_name != "input_ids":
        raise UsageError(f"{name} goes on from {printable(model.main_input_name)}, not from text")
    for field, kind, words in _READ_HERE:
        said = getattr(model.generation_config, field, None)
        values = said if isinstance(said, list) else [said]
        if said is not None and not all(type(value) is kind for value in values):
            raise BadInputError(f"generation_config.json: {field} is {printable(said)}, and not {words}")
    asked = [field for field in _OTHER_WAYS if getattr(model.generation_config, field, None)]
    if asked:
        raise BadInputError(
            f"generation_config.json: {asked[0]} asks for a way of decoding that is not here",
            hint=f"without {asked[0]} in it, text is greedy or sampled",
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """Positions that a model has for a prompt and for its text, in tokens, and the size of its vocabulary.

    If `behind`, as in a decoder-only model, new text takes the positions after the prompt; after an encoder, text has
    positions of its own.
    """

    prompt: int
    text: int
    vocabulary: int | None
    behind: bool

    @classmethod
    def of(cls, model: Any) -> Limits:
        """Read the limits from the model's configuration."""
        config = model.config
        writes = config.get_text_config(decoder=True)
        text = _positions(writes, "max_decoder_position_embeddings")
        if not config.is_encoder_decoder:
            return cls(text, text, getattr(writes, "vocab_size", None), behind=True)
        encoder = getattr(config, "encoder", None)
        reads = config.get_text_config(encoder=True) if encoder is None else encoder.get_text_config()
        prompt = _positions(reads, "max_encoder_position_embeddings")
        return cls(prompt, text, getattr(reads, "vocab_size", None), behind=False)

    def room(self, length: int) -> int:
        """Return the number of new tokens that have positions after a prompt of `length`; 0 if that is too long."""
        if self.behind:
            return max(0, self.text - length)
        return self.text - 1 if length <= self.prompt else 0  # the decoder begins with a token of its own

    def knows(self, token: int) -> bool:
        """Whether a prompt may contain the token."""
        return token >= 0 and (self.vocabulary is None or token < self.vocabulary)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise BadInputError, naming the prompt, if one is too long or has a token that the model does not know."""
        for number, prompt in enumerate(prompts, 1):
            named = f"prompt {number}" if len(prompts) > 1 else "the prompt"
            named += f" ({printable(prompt.text, _NAMED_BY)})"
            if self.room(len(prompt.ids)) < 1:
                raise BadInputError(f"{named} has {len(prompt.ids)} tokens, and the model {self.prompt} positions")
            if not self.knows(max(prompt.ids)):
                raise BadInputError(
                    f"{named} has the token {max(prompt.ids)}, and the model knows {self.vocabulary}: the tokenizer in"
                    " the folder is that of another model",
                    hint="convert it from a checkpoint with its own tokenizer",
                )


def _positions(config: Any, name: str) -> int:
    found = getattr(config, name, None) or getattr(config, "max_position_embeddings", None)
    return _ENDLESS if found is None else found

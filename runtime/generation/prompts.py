"""Prompts, as the user gives them and as tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from reshard.checkpoint.architecture import quiet_transformers
from reshard.errors import BadInputError
from reshard.files.system import by_errno
from reshard.launch.prompts import STDIN, decoded, prompt_lines
from reshard.text import listed, printable

from ..distributed.agreement import Deadline, from_first
from ..distributed.mesh import connect
from ..distributed.ranks import this_rank

__all__ = ["Prompt", "as_batch", "chat_turns", "in_chat", "load_tokenizer", "of_first_rank", "plain", "read_prompts"]

_TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.model", "*.tiktoken")
_HOW_TO_HAVE_ONE = (
    "put the model's own there (tokenizer.json, tokenizer_config.json …), or convert again from a source that has one;"
    " check and bench need none"
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, as the user wrote it and as tokens. An answer in a `chat` does not repeat it."""

    text: str
    ids: tuple[int, ...]
    chat: bool = False


def load_tokenizer(folder: str | Path, *, chat: bool = False) -> Any:
    """Load the tokenizer in a resharded folder. Raises BadInputError if there is none, or none for a chat."""
    from transformers import AutoTokenizer

    there = sorted({path.name for pattern in _TOKENIZER_FILES for path in Path(folder).glob(pattern)})
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not there and not len(tokenizer):
            raise ValueError("of no files, transformers makes one without tokens for some model types")
    except Exception as error:  # of any class: the files choose the code that runs
        reason = printable(" ".join(str(error).split()))
        words = f"transformers makes no tokenizer of {listed(there)}: {reason}" if there else "holds no tokenizer"
        hint = None if isinstance(error, ImportError) else _HOW_TO_HAVE_ONE
        raise by_errno(error, f"{printable(folder)}: {words}", BadInputError, hint=hint) from None
    if chat and not tokenizer.chat_template:
        raise BadInputError(
            f"{printable(folder)}: the tokenizer has no chat template", hint="without --chat, text is continued"
        )
    return tokenizer


def plain(tokenizer: Any, text: str) -> Prompt:
    """Make a prompt of a text to continue. Raises BadInputError if it has no tokens."""
    return Prompt(text, _tokens(tokenizer, text, add_special_tokens=True))


def in_chat(tokenizer: Any, messages: Sequence[dict[str, str]]) -> Prompt:
    """Make a prompt of a conversation by the tokenizer's chat template. The last message is the user's.

    Raises BadInputError if the template refuses the conversation.
    """
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program from the repo
        raise BadInputError(f"the tokenizer's chat template fails: {printable(error)}") from None
    return Prompt(messages[-1]["content"], _tokens(tokenizer, text, add_special_tokens=False), chat=True)


def _tokens(tokenizer: Any, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
    ids = tokenizer(text, add_special_tokens=add_special_tokens).input_ids
    if not ids:
        raise BadInputError("a prompt has no tokens")
    return tuple(ids)


def as_batch(
    prompts: Sequence[Prompt], *, pad: int, left: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids `[batch, longest]` and the mask that leaves out the padding: at the `left` for a decoder."""
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt.ids), longest) if left else slice(len(prompt.ids))
        ids[row, place] = torch.tensor(prompt.ids)
        mask[row, place] = 1
    return ids.to(device), mask.to(device)


def read_prompts(file: str, timeout: float) -> list[str]:
    """Return `prompt_lines` of a file or stdin, which rank 0 reads for all.

    `timeout` is in seconds, to reach rank 0. Raises BadInputError on every rank if there is nothing to read.
    """
    return of_first_rank(lambda: prompt_lines(file), timeout)


def chat_turns(timeout: float) -> Iterator[str]:
    """Yield the lines of stdin that are not empty, which rank 0 reads for all. `timeout` as in `read_prompts`."""

    def read() -> str | None:
        while line := _ask():
            if line.strip():
                return line.strip()
        return None

    while (turn := of_first_rank(read, timeout)) is not None:
        yield turn


def of_first_rank(read: Callable[[], Any], timeout: float) -> Any:
    """Return on every rank what `read` returns on rank 0, which must fit in JSON. `timeout` as in `read_prompts`."""
    info = this_rank()
    return from_first(connect(info, Deadline.after(timeout)), info, read)


def _ask() -> str:
    typed = sys.stdin.isatty()
    if typed:
        click.echo("> ", nl=False, err=True)
    line = sys.stdin.buffer.readline()
    if typed and not line.endswith(b"\n"):  # Ctrl-D leaves the cursor where it is
        click.echo(err=True)
    return decoded(line, STDIN)

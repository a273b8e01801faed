"""Entries of generation_config.json that cannot be followed, and what transformers would say of our calls."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from cli_tools import edit_json
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import reshard
import runtime
from reshard.errors import BadInputError
from reshard.operations.reference import fixed_ids, reference_of
from runtime.generation.generate import Decoding, Memory, generate_texts, greedy
from runtime.generation.limits import check_decoding
from runtime.generation.prompts import load_tokenizer, plain

CONFIG = "generation_config.json"
REFUSED: dict[str, dict[str, Any]] = {
    "no penalty": {"repetition_penalty": 0.0},
    "a text for a number": {"repetition_penalty": "high"},
    "half an ngram": {"no_repeat_ngram_size": 1.5},
    "a negative word": {"bad_words_ids": [[-1]]},
    "words that are none": {"bad_words_ids": 3},
    "a token that there is not": {"forced_eos_token_id": 10**9},
    "a text for a token": {"bos_token_id": "<s>"},
    "a text for a length": {"min_length": "x"},
    "a bias that is none": {"sequence_bias": [[[3], "x"]]},
    "half a penalty": {"exponential_decay_length_penalty": [1]},
}
READ_HERE: dict[str, dict[str, Any]] = {
    "an end that is a text": {"eos_token_id": "</s>"},
    "ends in lists": {"eos_token_id": [[2]]},
    "a stop that is a number": {"stop_strings": 5},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generation_config")
    reshard.convert(pico.save("llama", root / "source"), root / "out", tp_size=1, sync=False)
    return root


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(130)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t2")


def saying(made: Path, folder: Path, which: str, said: dict[str, Any]) -> Path:
    shutil.copytree(made / which, folder)
    edit_json(folder / CONFIG, lambda config: config.update(said))
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_refuses_is_named(name: str, made: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = runtime.load(saying(made, tmp_path / "out", "out", REFUSED[name]))
    single = LlamaForCausalLM.from_pretrained(saying(made, tmp_path / "source", "source", REFUSED[name])).eval()
    attempts = [
        lambda: generate_texts(model, tokenizer, [plain(tokenizer, "t5")], Decoding(max_new_tokens=3)),
        lambda: greedy(model, torch.tensor([[5]]), 3),
        lambda: reference_of(single, fixed_ids(single)),
    ]
    for attempt, folder in zip(attempts, ("out", "out", "source")):
        with pytest.raises(BadInputError, match=f"{folder}/{CONFIG}: transformers cannot decode as it says: ") as found:
            attempt()
        assert "\n" not in found.value.message


@pytest.mark.parametrize("name", READ_HERE)
def test_what_is_read_here_is_named_too(name: str, made: Path, tmp_path: Path) -> None:
    ((field, _),) = READ_HERE[name].items()
    with pytest.raises(BadInputError, match=f"{CONFIG}: {field} is .*, and not "):
        check_decoding(runtime.load(saying(made, tmp_path / "out", "out", READ_HERE[name])))


@pytest.mark.parametrize("said", [{"eos_token_id": [2, 3]}, {"stop_strings": ["t9"]}, {"pad_token_id": 0}, {}])
def test_what_is_right_is_taken(said: dict[str, Any], made: Path, tmp_path: Path) -> None:
    check_decoding(runtime.load(saying(made, tmp_path / "out", "out", said)))


def test_another_failure_is_not_the_files(made: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = runtime.load(made / "out")

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(ValueError, match=r"^a bug$"):
        generate_texts(model, tokenizer, [plain(tokenizer, "t5")], Decoding(max_new_tokens=3))


def test_a_conversation_goes_on_without_a_warning(made: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The turns give the text of a single call, from the cache, whatever name transformers has for the cache."""
    said: list[str] = []
    logger = logging.get_logger("transformers")
    for level in ("warning", "warning_once"):
        monkeypatch.setattr(type(logger), level, lambda _, message, *__, **___: said.append(message))
    model, memory = runtime.load(made / "out"), Memory()
    seen: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    how = Decoding(max_new_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [first] = generate_texts(model, tokenizer, [plain(tokenizer, "t5 t6")], how, memory=memory)
        longer = plain(tokenizer, f"t5 t6 {first.text} t7 t8")
        seen.clear()
        [second] = generate_texts(model, tokenizer, [longer], how, memory=memory)
        assert seen[0] == 3  # the last token of the answer, which no forward has seen, and the two new ones
        [alone] = generate_texts(model, tokenizer, [longer], how)
    assert (second.text, second.new_tokens) == (alone.text, alone.new_tokens)
    assert said == []


@pytest.mark.parametrize("content", ["{", '{"model": {"type": "WordLevel"}}'])
def test_a_tokenizer_that_is_none_is_said_in_one_whole_line(content: str, made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "out", tmp_path / "out"))
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(BadInputError, match=r"out: transformers makes no tokenizer of tokenizer\.json: \S+") as found:
        load_tokenizer(folder)
    assert "\n" not in found.value.message
    assert not found.value.message.endswith(":")
    assert "convert again" in str(found.value.hint)

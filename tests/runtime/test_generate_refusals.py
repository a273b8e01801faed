"""`generate` at its limits: prompts and chats that are too long, folders that ask for unsupported things, odd files."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import families
import make_pico
import pico
import pytest
import tokenizers
import torch
import transformers
from cli_tools import edit_json
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer, StaticCache

import reshard
from reshard.errors import BadInputError, UsageError
from runtime.commands import generate as command
from runtime.commands.generate import generate
from runtime.generation.generate import Decoding, Memory, generate_texts
from runtime.generation.limits import Limits, check_decoding
from runtime.generation.prompts import Prompt, chat_turns, read_prompts
from runtime.generation.texts import Stream, continuation

POSITIONS = 48
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


class Letters:
    """A tokenizer whose every token is a letter."""

    pad_token_id = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(0x4E00 + token) for token in ids if token > 2)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Several threads would wait for each other longer than such small models take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A tokenizer whose padding token has no row in a model of 330 tokens."""
    tokenizer = make_pico.make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.pad_token_id == 330
    return tokenizer


@pytest.fixture(scope="module")
def model() -> Any:
    model = pico.build("llama", vocab_size=330, max_position_embeddings=POSITIONS)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def made(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and its tokenizer for one rank, which can be this process."""
    folder = tmp_path_factory.mktemp("limits")
    model.save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    reshard.convert(folder / "source", folder / "out", tp_size=1, sync=False)
    return folder / "out"


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "own"))


@pytest.fixture(scope="module")
def single(model: Any, tokenizer: Any) -> Callable[..., str]:
    """`single(text, new)`: the model's continuation of a text by itself."""

    def go_on(text: str, new: int) -> str:
        ids = tokenizer(text, return_tensors="pt").input_ids
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        return tokenizer.decode(tokens[0], skip_special_tokens=True)[len(text) :]

    return go_on


def run(*arguments: object) -> None:
    generate.main([str(argument) for argument in arguments], standalone_mode=False)


def long(tokenizer: Any, tokens: int) -> str:
    """Return a text of so many tokens."""
    text = "~" * tokens
    assert len(tokenizer(text).input_ids) == tokens
    return text


def test_a_short_prompt_keeps_its_length_beside_a_long_one(model: Any) -> None:
    prompts = [Prompt("", tuple(range(3, 3 + length))) for length in (5, POSITIONS - 4, 7, POSITIONS - 1)]
    found = generate_texts(model, Letters(), prompts, Decoding(10))
    assert [one.prompt for one in found] == prompts
    assert [one.new_tokens for one in found] == [10, 4, 10, 1]
    for one in found:
        assert one == generate_texts(model, Letters(), [one.prompt], Decoding(10))[0]


@pytest.mark.parametrize("number", [1, 3])
def test_a_prompt_that_is_too_long_is_named_before_any_is_continued(
    number: int, made: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [part for text in ["Once"] * (number - 1) for part in ("--prompt", text)]
    name = "the prompt" if number == 1 else f"prompt {number}"
    words = rf"^{name} \(~{{19}}…\) has {POSITIONS} tokens, and the model {POSITIONS} positions$"
    with pytest.raises(BadInputError, match=words):
        run(made, *prompts, "--prompt", long(tokenizer, POSITIONS), "--batch-size", 1)
    assert capsys.readouterr().out == ""


def test_padding_and_prompts_beyond_the_vocabulary(
    made: Path, single: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ("Once upon a time", "cut")
    first = single(prompts[0], 12)
    stop = first[2:4]
    run(
        made, "--prompt", prompts[0], "--prompt", prompts[1], "--stop", stop, "--max-new-tokens", 12, "--format", "json"
    )
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["text"] for one in found] == [single(text, 12).partition(stop)[0] for text in prompts]
    assert found[0]["ended"] == "stop"
    with pytest.raises(BadInputError, match=r"prompt 2 \(x\[PAD\]\) has the token 330, and the model knows 330"):
        run(made, "--prompt", "x", "--prompt", "x[PAD]")


def test_an_encoder_is_refused_before_anything_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"vocab_size": 130, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, intermediate_size=32))
    bert.save_pretrained(tmp_path / "source")
    plan = {"bert.encoder.layer.*.attention.self.query": "colwise"}
    reshard.convert(tmp_path / "source", tmp_path / "out", tp_size=1, tp_plan=plan, sync=False)
    with pytest.raises(UsageError, match=r"^BertForMaskedLM does not generate text\n"):
        run(tmp_path / "out", "--prompt", "x")
    assert capsys.readouterr().out == ""


def test_a_model_that_does_not_go_on_from_text() -> None:
    with torch.device("meta"):
        whisper = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig())
    with pytest.raises(UsageError, match=r"^Whisper\w+ goes on from input_features, not from text$"):
        check_decoding(whisper)


def test_positions_of_an_encoder() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 130}
    bart = transformers.BartForConditionalGeneration(
        transformers.BartConfig(**sizes, max_position_embeddings=12)
    ).eval()
    prompts = [Prompt("abc", tuple(range(3, 3 + length))) for length in (12, 4)]
    found = generate_texts(bart, Letters(), prompts, Decoding(30))
    assert [one.new_tokens <= 11 for one in found] == [True, True]
    with pytest.raises(BadInputError, match=r"^the prompt \(abc\) has 13 tokens, and the model 12 positions$"):
        generate_texts(bart, Letters(), [Prompt("abc", tuple(range(3, 16)))], Decoding(30))
    with torch.device("meta"):
        longer = {"max_encoder_position_embeddings": 40, "max_decoder_position_embeddings": 20}
        led = transformers.LEDForConditionalGeneration(transformers.LEDConfig(**sizes, **longer, attention_window=4))
    assert Limits.of(led) == Limits(40, 20, 130, behind=False)
    both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(max_position_embeddings=30, vocab_size=77), transformers.BertConfig()
    )
    assert Limits.of(type("Both", (), {"config": both})) == Limits(30, 512, 77, behind=False)


def test_stop_texts_of_the_file(own: Path, single: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    """The file's stop texts work like the option's: left out, and named as the end; padding after them is no text."""
    prompts = ("Once upon a time", "cut")
    first = single(prompts[0], 12)
    stop = first[2:4]
    edit_json(own / "generation_config.json", lambda said: said.update(stop_strings=[stop]))
    asked = ["--prompt", prompts[0], "--prompt", prompts[1], "--max-new-tokens", 12, "--format", "json"]
    run(own, *asked)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["text"] for one in found] == [single(text, 12).partition(stop)[0] for text in prompts]
    assert (found[0]["ended"], found[0]["new_tokens"] < 12) == ("stop", True)
    run(own, *asked, "--stop", "nowhere to be found")
    assert json.loads(capsys.readouterr().out.splitlines()[0])["text"] == first


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"dola_layers": "low"}, "dola_layers"),
    ],
)
def test_searches_that_are_not_here(fields: dict[str, Any], words: str, own: Path) -> None:
    edit_json(own / "generation_config.json", lambda said: said.update(fields))
    with pytest.raises(BadInputError, match=rf"^generation_config.json: {words} asks for a way of decoding"):
        run(own, "--prompt", "Once")


def test_drafts_make_the_same_text(own: Path, single: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    """A batch also gets drafts, though transformers makes none for it."""
    edit_json(own / "generation_config.json", lambda said: said.update(prompt_lookup_num_tokens=3))
    run(own, "--prompt", "Once upon", "--prompt", "cut", "--max-new-tokens", 8, "--format", "json")
    found = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert found == [single("Once upon", 8), single("cut", 8)]


def test_a_line_ends_before_an_error_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def show(*texts: str, fail: bool = False) -> str:
        ended = pytest.raises(ZeroDivisionError) if fail else contextlib.nullcontext()
        with ended, command._as_it_comes("Once") as emit:
            for text in texts:
                emit(text)
            if fail:
                raise ZeroDivisionError
        return capsys.readouterr().out

    assert show(" upon", " a") == "Once upon a\n"
    assert show() == "Once\n"
    assert show(" upon", fail=True) == "Once upon\n"
    assert show(fail=True) == ""


def test_answers_to_several_prompts_can_be_told_apart(
    made: Path, single: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(made, "--chat", "--prompt", "Once", "--prompt", "cut", "--max-new-tokens", 4)
    expected = [f"> {text}\n{single(text + ' ', 4)}\n\n" for text in ("Once", "cut")]
    assert capsys.readouterr().out == "".join(expected)


def test_a_chat_that_outgrows_the_positions(
    made: Path,
    tokenizer: Any,
    single: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The chat goes on with its last turns, and says so; each answer follows from the turns that are left."""
    turns = [f"every rank {number}" for number in range(8)]
    monkeypatch.setattr(command, "chat_turns", lambda timeout: iter(turns))
    seen: list[str] = []
    real = command.in_chat
    monkeypatch.setattr(command, "in_chat", lambda *given: seen.append(said(given[1])) or real(*given))
    asked: list[str] = []
    go_on = command.generate_texts
    monkeypatch.setattr(command, "generate_texts", lambda *given, **how: asked.append(seen[-1]) or go_on(*given, **how))
    run(made, "--chat", "--max-new-tokens", 6)
    done = capsys.readouterr()
    assert done.out == "".join(f"{single(text, 6)}\n" for text in asked)
    assert len(asked) == len(turns)
    note = f"Note: the conversation has outgrown the model's {POSITIONS} positions; its beginning is forgotten\n"
    shortened = [text for before, text in itertools.pairwise(asked) if not text.startswith(before)]
    assert done.err == note * len(shortened)
    assert 1 < len(shortened) < len(turns) - 2
    monkeypatch.setattr(command, "chat_turns", lambda timeout: iter([long(tokenizer, POSITIONS)]))
    with pytest.raises(BadInputError, match=r"^the prompt \(~+…\) has 49 tokens"):
        run(made, "--chat")


def said(messages: list[dict[str, str]]) -> str:
    return "".join(f"{message['content']} " for message in messages)


def test_a_chat_that_is_ended_at_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-D ends the chat and leaves no line of its own."""
    terminal, typed = pty.openpty()
    os.write(terminal, b"hello\n\x04")
    with open(typed) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert list(chat_turns(5)) == ["hello"]
    os.close(terminal)
    assert capsys.readouterr().err == "> > \n"


def test_lines_of_a_file(tmp_path: Path) -> None:
    """Lines end where editors end them; a byte order mark is no part of the first."""
    (tmp_path / "prompts").write_bytes("\ufeffone\u2028two\x0cthree\r\n\r\nfour\x85\n".encode())
    assert read_prompts(str(tmp_path / "prompts"), 5) == ["one\u2028two\x0cthree", "four\x85"]


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", "nan"],
        ["--temperature", "inf"],
        ["--temperature", "1", "--top-p", "nan"],
        ["--timeout", "inf"],
    ],
)
def test_numbers_that_are_none(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(click.BadParameter, match="is not a finite number"):
        run(tmp_path / "nowhere", "--prompt", "x", *options)


@pytest.fixture(scope="module")
def fallback() -> Any:
    """A tokenizer that spells in bytes what it does not know, as SentencePiece's do."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<unk>": 256, "a": 257}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    made.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize(
    ("prompt", "new"),
    [("😀😀", "😀"), ("a" + 5 * "😀", "😀a"), ("ä😀a", "ä"), ("\ufffd" + 4 * "😀", "a😀"), ("\ufffd", "a")],
)
def test_text_behind_characters_that_are_spelt_in_bytes(prompt: str, new: str, fallback: Any) -> None:
    ids, more = fallback(prompt).input_ids, fallback(new).input_ids
    assert continuation(fallback, ids, more) == new
    pieces: list[str] = []
    stream = Stream(fallback, (), pieces.append)
    for tokens in (ids, *([token] for token in more)):
        stream.put(torch.tensor(tokens))
    stream.end()
    assert "".join(pieces) == new


def conversation(model: Any, memory: Memory, turns: int) -> Iterator[tuple[str, str, int]]:
    """Yield each turn's text with a memory and without one, and its number of tokens."""
    ids: tuple[int, ...] = tuple(range(3, 10))
    for turn in range(turns):
        prompt = [Prompt("", ids, chat=True)]
        [one] = generate_texts(model, Letters(), prompt, Decoding(5), memory=memory)
        [fresh] = generate_texts(model, Letters(), prompt, Decoding(5))
        yield one.text, fresh.text, len(ids)
        ids = (*ids, *(ord(letter) - 0x4E00 for letter in one.text), 20 + turn, 30 + turn)


def test_a_chat_in_which_longrope_takes_other_frequencies() -> None:
    """The cache computed with the frequencies for short texts is not continued."""
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.0], "long_factor": [9.0, 30.0]}
    rope["original_max_position_embeddings"] = 20
    model = pico.build("llama", rope_parameters={**rope, "factor": 3.2})
    model.generation_config.eos_token_id = None
    memory = Memory()
    found = list(conversation(model, memory, 5))
    assert [text for text, _, _ in found] == [fresh for _, fresh, _ in found]
    assert found[-1][2] > 20


@pytest.mark.parametrize("family", ["llama", "llama4_text", "gemma3n_text", "bamba"])
def test_a_chat_says_the_same_whatever_layers_it_has(family: str) -> None:
    model = families.build(family)
    model.generation_config.eos_token_id = None
    for text, fresh, _ in conversation(model, Memory(), 4):
        assert text == fresh


def test_what_is_remembered() -> None:
    """Only a cache of exactly the seen tokens, and of a kind that can be continued, is recalled."""
    config = transformers.LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2)
    states = torch.zeros(1, 2, 3, 4)

    def recalled(cache: Any, ids: tuple[int, ...] = (5, 6, 7, 8)) -> Any:
        if hasattr(cache, "update"):
            cache.update(states, states, 0)
        memory = Memory()
        memory.keep(ids, cache)
        return memory.recall((*ids, 9))

    cache = DynamicCache()
    assert recalled(cache) is cache
    assert recalled(DynamicCache(), (5, 6, 7)) is None  # the cache was cut or is ahead
    assert recalled(StaticCache(config, max_cache_len=8)) is None
    assert recalled(None) is None
    sliding = DynamicCache()
    sliding.layers.append(DynamicSlidingWindowLayer(2))
    assert recalled(sliding) is sliding

    class Recurrent(DynamicCache):
        """A cache with a state beside its layers."""

    assert recalled(Recurrent()) is None


def test_a_turn_that_failed_is_forgotten(model: Any) -> None:
    memory = Memory()
    turns = conversation(model, memory, 3)
    next(turns)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        next(turns)
    handle.remove()
    for text, fresh, _ in conversation(model, memory, 3):
        assert text == fresh

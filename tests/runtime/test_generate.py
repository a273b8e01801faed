"""`generate`: it prints what the single process generates, whatever the options; and its refusals."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import families
import make_pico
import pico
import pytest
import torch
import torch.distributed as dist
import transformers
import warm_commands
from cli_tools import edit_json
from hypothesis import given, settings
from hypothesis import strategies as st
from places import WORKERS
from torchrun_tools import on_ranks

import reshard
from reshard.errors import BadInputError, ReshardError, UsageError
from runtime.commands.generate import generate
from runtime.distributed.agreement import from_first
from runtime.distributed.ranks import RankInfo
from runtime.generation.in_step import by_name
from runtime.generation.prompts import in_chat, load_tokenizer, read_prompts
from runtime.generation.texts import Stops, Stream, before_stop, continuation
from runtime.loading.phases import load_report
from runtime.model.kernels import check_attention, compiler_errors

WORKER = WORKERS / "generating.py"
ALL = ["samples", "beams", "clocks", "criteria", "processors", "batches", "remembers", "compiled", "kernels"]
ALL += ["attention", "frees"]
UNEVEN = {"vocab_size": 131, "num_key_value_heads": 2, "intermediate_size": 50}  # at 4 ranks, two share a KV head
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ ' ' if m.role == 'assistant' }}{% endfor %}"
BEGINNING = "Once upon a time"


@pytest.mark.parametrize(
    ("ranks", "models"),
    [
        (
            2,
            [
                ("llama", {}, {}, ALL),
                ("gemma2", {"sliding_window": 6}, {}, ["samples", "remembers"]),
                ("qwen3_moe", {}, {"ep": 2}, ["own_heads"]),
            ],
        ),
        (
            4,
            [
                ("llama", UNEVEN, {}, ["samples", "beams", "batches"]),
                ("llama", {**UNEVEN, "num_hidden_layers": 1}, {}, ["compiled"]),
            ],
        ),
    ],
)
def test_every_rank_generates_what_one_process_does(ranks: int, models: list[Any], tmp_path: Path) -> None:
    jobs = []
    for number, (family, config, sizes, cases) in enumerate(models):
        source, folder = pico.save(family, tmp_path / f"{number}.source", **config), tmp_path / f"{number}"
        reshard.convert(source, folder, tp_size=1 if sizes else ranks, ep_size=sizes.get("ep", 1), sync=False)
        jobs.append({"source": str(source), "folder": str(folder), "cases": cases})
    if ranks == 2:
        jobs.append({**encoder(tmp_path), "cases": ["attention"]})
        families.save(families.build("jamba"), tmp_path / "jamba.source")
        reshard.convert(tmp_path / "jamba.source", tmp_path / "jamba", tp_size=2, sync=False)
        jobs.append({"source": str(tmp_path / "jamba.source"), "folder": str(tmp_path / "jamba"), "cases": ["forgets"]})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = on_ranks(ranks, str(WORKER), str(tmp_path / "jobs.json"))
    assert done.returncode == 0, done.stderr
    assert "all cases hold" in done.stdout


def encoder(root: Path) -> dict[str, str]:
    """A BERT, a family without a plan, on two ranks."""
    sizes = {"vocab_size": 130, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=32))
    model.save_pretrained(root / "bert.source")
    plan = {f"self.{name}": "colwise" for name in ("query", "key", "value")}
    plan |= {"attention.output.dense": "rowwise"}
    reshard.convert(root / "bert.source", root / "bert", tp_size=2, tp_plan=plan, sync=False)
    return {"source": str(root / "bert.source"), "folder": str(root / "bert")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has begun to learn its text, and a tokenizer with a chat template.

    Their files make transformers warn on every rank: no test may see a warning on stderr.
    """
    folder = tmp_path_factory.mktemp("generate") / "source"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_pico, "STEPS", 40)
        make_pico.main(str(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", lambda said: said.update(clean_up_tokenization_spaces=True))
    edit_json(folder / "generation_config.json", lambda said: said.update(temperature=0.6))
    return folder


@pytest.fixture(scope="module")
def out(source: Path) -> Path:
    reshard.convert(source, source.parent / "out", tp_size=2, sync=False)
    return source.parent / "out"


@pytest.fixture(scope="module")
def single(source: Path) -> Any:
    """`single(text, **options)`: one process's continuation of a text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()

    def go_on(text: str, seed: int = 0, **options: Any) -> str:
        ids = tokenizer(text, return_tensors="pt").input_ids
        torch.manual_seed(seed)
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **{"do_sample": False, **options})
        return tokenizer.decode(tokens[0], skip_special_tokens=True)[len(text) :]

    return go_on


def run(out: Path, *options: str, typed: str | None = None, **popen: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [warm_commands.python(), "-m", "reshard", "run", str(out), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        input=typed,
        stderr=subprocess.PIPE,
        **{"stdout": subprocess.PIPE, **popen},
        text=True,
        check=False,
        timeout=120,
    )


def test_text_and_report(out: Path, single: Any) -> None:
    done = run(out, "--prompt", BEGINNING, "--max-new-tokens", "20", "--report")
    assert done.stdout == BEGINNING + single(BEGINNING, max_new_tokens=20) + "\n"
    lines = done.stderr.splitlines()
    assert 1 <= len(lines) <= 2  # rank 0, and the slowest rank if another; stderr has no other lines
    assert lines[0].startswith("rank 0: loaded 0.000 GB at ")
    assert "import" in lines[0]
    assert done.returncode == 0


def test_a_batch_from_stdin(out: Path, single: Any) -> None:
    """There are more prompts than go into one batch, of several lengths; empty lines are skipped."""
    options = ["--prompt", "The model said", "--stop", "out its", "--max-new-tokens", "30", "--batch-size", "2"]
    done = run(out, "--prompts", "-", *options, "--format", "json", typed=f"{BEGINNING}\n\nThen somebody cut it\n")
    assert (done.returncode, done.stderr) == (0, "")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["prompt"] for one in found] == ["The model said", BEGINNING, "Then somebody cut it"]
    for one in found:
        text = single(one["prompt"], max_new_tokens=30)
        assert one["text"] == before_stop(text, ["out its"])
        assert one["ended"] == ("stop" if "out its" in text else "length" if one["new_tokens"] == 30 else "eos")
    assert {one["ended"] for one in found} >= {"stop"}


def test_replicas_share_the_prompts(out: Path, single: Any) -> None:
    """Answers come in order, whichever replica made them; one round has --batch-size for each replica."""
    prompts = ["Once upon", "Then somebody", "The model said", "every rank", "Once upon a time every"]
    options = [part for prompt in prompts for part in ("--prompt", prompt)]
    asked = ["--dp", "2", *options, "--batch-size", "1", "--format", "json", "--max-new-tokens", "8"]
    done = on_ranks(4, "-m", "runtime", "generate", str(out), *asked)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["prompt"] for one in found] == prompts
    assert [one["text"] for one in found] == [single(prompt, max_new_tokens=8) for prompt in prompts]


@pytest.mark.parametrize(
    ("kernels", "note"),
    [
        (["--cache", "static", "--sdpa", "math"], ""),
        pytest.param(["--compile", "reduce-overhead"], "Note: reduce-overhead captures CUDA", marks=pytest.mark.slow),
    ],
)
def test_sampling(kernels: list[str], note: str, out: Path, single: Any) -> None:
    """The same seed gives the same text as in one process, with any kernels."""
    options = {"temperature": 5.0, "top_p": 0.9, "top_k": 20, "max_new_tokens": 24}
    asked = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    asked += ["--seed", "11", "--format", "json", *kernels]
    done = on_ranks(2, "-m", "runtime", "generate", str(out), "--prompt", BEGINNING, *asked)
    assert done.returncode == 0, done.stderr
    assert done.stderr.partition(" graphs")[0] == note
    [found] = map(json.loads, done.stdout.splitlines())
    assert found["seed"] == 11
    assert found["text"] == single(BEGINNING, seed=11, do_sample=True, **options)
    assert found["text"] != single(BEGINNING, max_new_tokens=24)


def test_a_chat(out: Path, single: Any) -> None:
    """Each answer follows from all earlier turns."""
    said, answers = BEGINNING, []
    for turn in ("", "Then somebody"):
        said += turn
        answers.append(single(said, max_new_tokens=12))
        said += answers[-1] + " "
    done = run(out, "--chat", "--max-new-tokens", "12", typed=f"{BEGINNING}\n \nThen somebody\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)


def test_a_chat_at_a_terminal_until_ctrl_c(out: Path, single: Any) -> None:
    command = [sys.executable, "-m", "reshard", "run", str(out), "--chat", "--max-new-tokens", "12"]
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, command)
    assert until(terminal, "> ") == "> "
    os.write(terminal, f"{BEGINNING}\n".encode())
    assert until(terminal, "> ") == f"{BEGINNING}\r\n{single(BEGINNING, max_new_tokens=12)}\r\n> "
    began = time.monotonic()
    os.write(terminal, b"\x03")
    assert click.unstyle(until(terminal, "interrupted\r\n")) == "^C\r\nError: interrupted\r\n"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert time.monotonic() - began < 5
    os.close(terminal)


def until(terminal: int, text: str, seconds: float = 60) -> str:
    found = b""
    end = time.monotonic() + seconds
    while not found.decode(errors="replace").endswith(text):
        assert select.select([terminal], [], [], max(0, end - time.monotonic()))[0], found
        found += os.read(terminal, 1000)
    return found.decode()


def test_a_reader_who_has_gone(out: Path) -> None:
    """The command ends as a pipe's writer does, and no rank complains."""
    reading, writing = os.pipe()
    os.close(reading)
    done = run(out, "--prompt", BEGINNING, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nothing to continue"),
        (["--prompt", "x", "--top-p", "0.5"], "--top-p is for sampling"),
        (["--prompt", "x", "--seed", "0"], "--seed is for sampling"),
        (["--prompt", "x", "--compile", "default", "--cache", "dynamic"], "needs a static cache"),
        (["--chat", "--dp", "2"], "a chat is one replica's"),
        (["--prompt", "x", "--stop", ""], "empty text"),
        (["--prompt", "x", "--sdpa", "cudnn", "--device", "cpu"], "--sdpa cudnn: torch has no such kernel"),
        (["--prompt", "x", "--sdpa", "math", "--attn", "eager"], "--sdpa math goes with attention sdpa, and .* eager"),
    ],
)
def test_options_that_make_no_sense(options: list[str], words: str, tmp_path: Path) -> None:
    """The error comes before anything is loaded."""
    with pytest.raises(UsageError, match=words):
        generate.main([str(tmp_path / "nowhere"), *options], standalone_mode=False)


@pytest.mark.parametrize(
    ("content", "words"), [(b"\n \n", "holds no prompts"), (b"\xff", "is not UTF-8"), (None, "No such file")]
)
def test_files_that_hold_no_prompts(content: bytes | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "prompts").write_bytes(content)
    with pytest.raises(BadInputError, match=words):
        read_prompts(str(tmp_path / "prompts"), 5)


def test_a_folder_without_a_template_or_a_tokenizer(resharded: Path, source: Path) -> None:
    with pytest.raises(BadInputError, match=r"holds no tokenizer\n") as found:
        load_tokenizer(resharded)
    assert "check and bench need none" in str(found.value.hint)
    tokenizer = load_tokenizer(source, chat=True)
    tokenizer.chat_template = "{{ raise_exception('users only') }}"
    with pytest.raises(BadInputError, match="chat template fails: users only"):
        in_chat(tokenizer, [{"role": "user", "content": "hello"}])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(source.parent / "plain")
    with pytest.raises(BadInputError, match="has no chat template"):
        load_tokenizer(source.parent / "plain", chat=True)


def test_what_rank_0_finds_or_cannot_find_all_hear() -> None:
    store = dist.HashStore()
    assert from_first(store, RankInfo(0, 1, 0), lambda: "alone") == "alone"
    for find, raised in ((lambda: ["a", None], None), (failing, "broken")):
        with pytest.MonkeyPatch.context() as patch:
            for rank in (0, 1):
                patch.setattr("runtime.distributed.agreement._messages", iter([7]))
                if raised:
                    with pytest.raises(BadInputError, match=raised):
                        from_first(store, RankInfo(rank, 2, 0), find)
                else:
                    assert from_first(store, RankInfo(rank, 2, 0), find) == ["a", None]


def failing() -> Any:
    raise BadInputError("broken")


def test_flash_attention_is_refused_for_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    with pytest.raises(UsageError, match="flash_attention_2 needs a GPU"):
        check_attention("flash_attention_2", torch.device("cpu"), "bfloat16")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="package flash_attn_interface is not installed"):
        check_attention("flash_attention_3", gpu, "bfloat16")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UsageError, match="in float16 or bfloat16, and the folder is float32"):
        check_attention("flash_attention_2", gpu, "float32")
    for name in ("flash_attention_2", "sdpa", "mine", None):
        check_attention(name, gpu, "bfloat16")


def test_a_compiler_that_fails_is_said_in_one_line() -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no working compiler\nat great length")

    with pytest.raises(ReshardError, match=r"^--compile: .*no working compiler") as found, compiler_errors():
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
    assert "\n" not in found.value.message
    with pytest.raises(ZeroDivisionError), compiler_errors():
        raise ZeroDivisionError


def test_the_report_names_rank_0_and_the_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ("handshake", "open", "import", "build", "read", "agree")
    ranks = [(dict.fromkeys(parts, seconds), 2_000_000_000) for seconds in (0.5, 0.25, 1.0)]

    class Mesh:
        size = staticmethod(lambda: 3)
        get_group = staticmethod(lambda: None)

    class Model:
        reshard_seconds, reshard_bytes = ranks[0]
        _reshard_quantized = SimpleNamespace(report=lambda _: ["compute: native"])
        _device_mesh = Mesh

    monkeypatch.setattr(dist, "all_gather_object", lambda found, mine, group: found.__setitem__(slice(None), ranks))
    first, slowest, computed = load_report(Model).splitlines()
    assert computed == "compute: native"
    assert first.startswith("rank 0: loaded 2.000 GB at 1.33 GB/s in 3.000 s: handshake 0.500, ")
    assert slowest.startswith("rank 2: loaded 2.000 GB at 0.67 GB/s in 6.000 s: ")


def test_arguments_by_name() -> None:
    def generate(inputs: Any = None, config: Any = None, criteria: Any = None, **kwargs: Any) -> None: ...
    def speech(*args: Any, **kwargs: Any) -> None: ...

    assert by_name(signature(generate), (1, None, [2]), {"top_k": 3}) == (
        (),
        {"inputs": 1, "config": None, "criteria": [2], "top_k": 3},
    )
    assert by_name(signature(speech), (1,), {"criteria": [2]}) == ((1,), {"criteria": [2]})


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode(errors="replace")


TEXTS = st.text("ab ä€🏖", max_size=12)


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS, st.lists(st.text("ab ä", min_size=1, max_size=3), max_size=3))
def test_a_stream_is_the_text_before_the_first_stop(prompt: str, text: str, stops: list[str]) -> None:
    """The stream never prints half a character or the start of a stop text, and a row ends at a complete stop text."""
    pieces: list[str] = []
    stream = Stream(Bytes(), stops, pieces.append)
    ids, new = list(prompt.encode()), list(text.encode())
    stream.put(torch.tensor([ids], dtype=torch.long))
    for token in new:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == before_stop(text, stops)
    assert continuation(Bytes(), ids, new) == text
    if not stops:
        return
    criterion = Stops(Bytes(), stops, [ids], len(ids))
    done = [criterion(torch.tensor([[*ids, *new[:count]]]), None).item() for count in range(1, len(new) + 1)]
    complete = [any(stop in bytes(new[:n]).decode(errors="ignore") for stop in stops) for n in range(1, len(new) + 1)]
    assert done == complete
    assert criterion.ends == [complete.index(True) + 1 if True in complete else None]

"""Run under torchrun: a model must generate on every rank what the single process does, whatever the ranks do.

    generating.py JOBS.json

JOBS is a list of {"source", "folder", "cases"}, where "cases" are names of functions below. Any difference is an
assertion, hence a non-zero exit.
"""

import copy
import gc
import inspect
import itertools
import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers.generation.stopping_criteria as criteria_module
from compiling import leave_guards_as_they_are
from transformers import GenerationConfig

import runtime
import runtime.model.kernels
from reshard.errors import UsageError
from reshard.strategies import linear
from runtime.generation.argmax import joins_logits
from runtime.generation.generate import Decoding, Memory, generate_texts
from runtime.generation.prompts import Prompt

NEW = 10
IDS = torch.randint(3, 130, (3, 7), generator=torch.Generator().manual_seed(7))
PROMPTS = [Prompt("", tuple(IDS[row, : 7 - 2 * row].tolist())) for row in range(3)]  # 7, 5 and 3 tokens


class Letters:
    """A tokenizer whose every token is a letter."""

    pad_token_id = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(0x4E00 + token) for token in ids if token > 2)


def generate(model: Any, **options: Any) -> torch.Tensor:
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), **{"max_new_tokens": NEW, **options})


def everywhere(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def assert_alike(tokens: torch.Tensor) -> None:
    assert all(one == tokens.tolist() for one in everywhere(tokens.tolist()))


def differently_on_each_rank(rank: int) -> None:
    torch.manual_seed(100 + rank)
    torch.rand(5 * rank)


def samples(model: Any, single: Any, rank: int) -> None:
    """Sampled tokens are those of one process with rank 0's random state, in a second call too."""
    for options in ({}, {"num_beams": 3}, {"top_k": 5, "temperature": 0.7, "num_return_sequences": 2}):
        differently_on_each_rank(rank)
        found = [generate(model, do_sample=True, **options) for _ in range(2)]
        differently_on_each_rank(0)
        for tokens in found:
            assert torch.equal(tokens, generate(single, do_sample=True, **options)), options
    assert not torch.equal(*found)
    assert len(set(map(str, everywhere(torch.get_rng_state().tolist())))) == 1


def beams(model: Any, single: Any, rank: int) -> None:
    options = {"do_sample": False, "num_beams": 4, "early_stopping": True}
    assert torch.equal(generate(model, **options), generate(single, **options))


def clocks(model: Any, single: Any, rank: int) -> None:
    """Rank 0's clock decides for all, however `max_time` is given."""
    whole = generate(single, do_sample=False)
    real = criteria_module.time.time
    hours = itertools.count(step=3600)
    try:
        for slow, expected in ((1, whole), (0, whole[:, : IDS.shape[1] + 1])):
            if rank == slow:
                criteria_module.time.time = lambda: real() + next(hours)
            config = GenerationConfig(**{**model.generation_config.to_diff_dict(), "max_time": 100.0})
            assert torch.equal(generate(model, do_sample=False, max_time=100.0), expected)
            assert torch.equal(generate(model, do_sample=False, generation_config=config), expected)
            model.generation_config.max_time = 100.0
            assert torch.equal(generate(model, do_sample=False), expected)
            model.generation_config.max_time = None
            criteria_module.time.time = real
    finally:
        criteria_module.time.time = real


def criteria(model: Any, single: Any, rank: int) -> None:
    """The caller's own criterion decides on rank 0 for all; the others do not even ask it."""

    def only(said: int) -> Any:
        return lambda ids, scores, **_: torch.full((len(ids),), rank == said and ids.shape[1] > 8)

    whole = generate(single, do_sample=False)
    assert torch.equal(generate(model, do_sample=False, stopping_criteria=[only(1)]), whole)
    assert torch.equal(generate(model, do_sample=False, stopping_criteria=[only(0)]), whole[:, :9])


def processors(model: Any, single: Any, rank: int) -> None:
    """Ranks whose processors disagree still choose the same tokens."""

    def disturb(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + 5 * torch.randn(scores.shape, generator=torch.Generator().manual_seed(rank))

    for options in ({"do_sample": False}, {"do_sample": True}, {"do_sample": False, "num_beams": 2}):
        assert_alike(generate(model, logits_processor=[disturb], **options))


def own_heads(model: Any, single: Any, rank: int) -> None:
    """Ranks that compute all logits by themselves may differ in the last bits: rank 0's decide."""
    assert not joins_logits(model)
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: output + rank * torch.randn(130))
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}):
        assert torch.equal(generate(model, **options), generate(single, **options))
    handle.remove()


def alone(single: Any, **options: Any) -> list[list[int]]:
    """Return how the single process continues each prompt alone, up to the end of the text."""
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt.ids])
        tokens = single.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **options
        )
        found.append(tokens[0, ids.shape[1] :].tolist())
    return found


def batches(model: Any, single: Any, rank: int) -> None:
    """Prompts of several lengths give the same texts together as alone: with stop texts, and as a stream too."""
    letters = Letters()
    expected = alone(single)
    texts = [letters.decode(tokens, True) for tokens in expected]
    model.generation_config.eos_token_id = eos = expected[1][4]
    ended = [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in expected]
    assert alone(single, eos_token_id=eos) == ended
    for cache in ("dynamic", "static"):
        found = generate_texts(model, letters, PROMPTS, Decoding(NEW, cache=cache))
        assert [one.text for one in found] == [letters.decode(tokens, True) for tokens in ended]
        assert [one.new_tokens for one in found] == [len(tokens) for tokens in ended]
        assert [one.ended == "eos" for one in found] == [eos in tokens for tokens in expected]
    model.generation_config.eos_token_id = None
    stop = texts[0][3:5]
    [first, second, _] = generate_texts(model, letters, PROMPTS, Decoding(NEW, stops=(stop, "not there")))
    count = next(n for n in range(NEW) if stop in letters.decode(expected[0][:n], True))
    assert (first.text, first.new_tokens, first.ended) == (texts[0].partition(stop)[0], count, "stop")
    assert (second.text, second.ended) == (texts[1], "length")
    for stops in ((), (stop,)):
        pieces: list[str] = []
        calls = count_calls()
        with calls:
            [one] = generate_texts(model, letters, PROMPTS[:1], Decoding(NEW, stops=stops), emit=pieces.append)
        assert "".join(pieces) == one.text == texts[0].partition(stop if stops else "none")[0]
        assert len(pieces) > 1
        steps = one.new_tokens
        assert calls.made == {"all_gather": 1, "largest_only": steps - 1}, (
            "logits were gathered, or the other way round"
        )
    with count_calls() as calls:
        generate_texts(model, letters, PROMPTS, Decoding(NEW, temperature=0.5))
    assert calls.made["largest_only"] == 0


def forgets(model: Any, single: Any, rank: int) -> None:
    """A turn does not continue a recurrent state: not every family can, given several tokens at once."""
    remembers(model, single, rank, forgets=True)


def remembers(model: Any, single: Any, rank: int, *, forgets: bool = False) -> None:
    """A turn computes only its new tokens, or all if its past has changed, and gives the same text."""
    letters, memory = Letters(), Memory()
    lengths: list[int] = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[-1]))

    def turn(ids: tuple[int, ...], computed: int, **how: Any) -> tuple[int, ...]:
        lengths.clear()
        [one] = generate_texts(model, letters, [Prompt("", ids, chat=True)], Decoding(NEW, **how), memory=memory)
        whole = torch.tensor([ids])
        mask = torch.ones_like(whole)  # the text so far may contain the padding token
        expected = single.generate(whole, attention_mask=mask, max_new_tokens=NEW, do_sample=False)[0].tolist()
        assert one.text == letters.decode(expected[len(ids) :], True)
        assert lengths[0] == (len(ids) if forgets else computed), lengths
        return tuple(expected)

    said = turn(PROMPTS[0].ids, len(PROMPTS[0].ids))
    said = turn((*said, 5, 6, 7), 4)  # no forward has seen an answer's last token
    said = turn((*said, 8), 2, cache="dynamic")
    turn((*said[:-3], 9, 9, 9), len(said))
    short = turn(PROMPTS[2].ids, len(PROMPTS[2].ids))
    turn(short[:-2], len(short) - 2)  # shorter than what is remembered
    turn((*short, 5), len(short) + 1)
    turn((*short, 5, 6), len(short) + 2, cache="static")
    handle.remove()


class count_calls:
    """Counts how often a head gathered its logits, and how often it gave only the largest."""

    def __enter__(self) -> Any:
        self.made = {"all_gather": 0, "largest_only": 0}
        self.real = {name: getattr(linear, name) for name in self.made}
        for name in self.made:
            setattr(linear, name, self.counted(name))
        return self

    def counted(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.made[name] += 1
            return self.real[name](*arguments)

        return call

    def __exit__(self, *_: object) -> None:
        for name, real in self.real.items():
            setattr(linear, name, real)


def compiled(model: Any, single: Any, rank: int) -> None:
    """Compiled steps give the same tokens, and a second call with the same shapes compiles nothing."""
    made = 0

    def backend(graph: Any, inputs: list) -> Any:
        nonlocal made
        made += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    real = runtime.model.kernels.compile_config
    runtime.model.kernels.compile_config = lambda mode: setattr_on(real(mode), backend=backend, fullgraph=True)
    expected = [Letters().decode(tokens, True) for tokens in alone(single)]
    for how in (Decoding(NEW, compiled="default"), Decoding(NEW, compiled="default", stops=("no",))):
        found = generate_texts(model, Letters(), PROMPTS, how)
        assert [one.text for one in found] == expected
    assert made == 1
    runtime.model.kernels.compile_config = real


def setattr_on(value: Any, **attributes: Any) -> Any:
    for name, attribute in attributes.items():
        setattr(value, name, attribute)
    return value


def kernels(model: Any, single: Any, rank: int) -> None:
    """Each of torch's kernels computes the same; an unavailable one is refused on all ranks."""
    with torch.inference_mode():
        expected = single(IDS).logits
        for kernel in (None, "flash", "math"):
            with runtime.sdpa(kernel):
                torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
        for kernel in ("cudnn", "mem-efficient"):
            with pytest.raises(UsageError, match=f"--sdpa {kernel}"), runtime.sdpa(kernel):
                model(IDS)
        with runtime.sdpa("math"), pytest.raises(RuntimeError, match="another"):
            raise RuntimeError("another")


def attention(model: Any, single: Any, rank: int) -> None:
    """An unavailable attention implementation is refused on all ranks, before anything is read."""
    folder = model.name_or_path
    with torch.inference_mode():
        expected = single(IDS)[0]
        for name in ("eager", "sdpa"):
            loaded = runtime.load(folder, attn_implementation=name)
            assert loaded.config._attn_implementation == name
            torch.testing.assert_close(loaded(IDS)[0], expected, rtol=1e-5, atol=1e-5)
    for name, words in (
        ("flash_attention_2", "needs a GPU, and this is cpu"),
        ("flash", "is not known; there are eager"),
    ):
        with pytest.raises(UsageError, match=f"^--attn {name} {words}"):
            runtime.load(folder, attn_implementation=name)
    type(model)._supports_sdpa = False
    with pytest.raises(UsageError, match=f"^--attn sdpa: {type(model).__name__} does not support it"):
        runtime.load(folder, attn_implementation="sdpa")
    type(model)._supports_sdpa = True


def frees(model: Any, single: Any, rank: int) -> None:
    """A model without references is freed at once, with its memory."""
    loaded = runtime.load(model.name_or_path)
    assert next(iter(inspect.signature(loaded.generate).parameters)) == "inputs"
    gc.collect()
    gc.disable()
    generate(loaded, do_sample=True)
    there = weakref.ref(loaded)
    copied = copy.deepcopy(loaded)
    del loaded
    assert there() is None
    assert generate(copied, do_sample=False).equal(generate(single, do_sample=False))
    gc.enable()


def main(jobs: str) -> None:
    rank = int(os.environ["RANK"])
    leave_guards_as_they_are()
    for job in json.loads(Path(jobs).read_text()):
        model = runtime.load(job["folder"])
        single = type(model).from_pretrained(job["source"]).eval()
        for one in (model, single) if model.can_generate() else ():
            one.generation_config.eos_token_id = None  # rows then have equally many tokens, unless a case changes it
        for case in job["cases"]:
            try:
                globals()[case](model, single, rank)
            except Exception as error:
                raise AssertionError(f"{job['folder']}: {case} on rank {rank}") from error
    dist.barrier()
    if rank == 0:
        print("all cases hold", flush=True)


main(*sys.argv[1:])
os._exit(0)  # gloo's threads can abort the interpreter while it shuts down, when all is done

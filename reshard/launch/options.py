"""The options of the commands that run on ranks, each declared once: for `reshard run`, `check` and `bench`, and for a
rank. What torch or transformers know by other names stands here by its name alone: both are slow to import."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import click
from click.shell_completion import CompletionItem

__all__ = [
    "ENGINES",
    "SDPA_BACKENDS",
    "Batches",
    "Device",
    "FiniteRange",
    "bench_options",
    "check_options",
    "completions",
    "format_option",
    "generate_options",
    "job_options",
    "revision_option",
    "strategies_option",
]

Declare = Callable[[Callable[..., Any]], Callable[..., Any]]

# Kernels of torch's attention, and what torch.nn.attention.SDPBackend calls them.
SDPA_BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "mem-efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "math": "MATH",
}
ENGINES = ("tensor_parallel", "transformers")  # which `bench` can measure beside ours
_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
_POSITIVE = click.IntRange(min=1)


class FiniteRange(click.FloatRange):
    """A range of numbers: `nan` and `inf` are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or a usage error."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return float(number)


class Batches(click.ParamType):
    """Batch sizes: 1,2,4."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Numbers of a text such as 1,2,4."""
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and int(part) for part in parts):
            self.fail(f"{value!r} is not a list of batch sizes such as 1,2,4", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


class Device(click.ParamType):
    """A kind of device that models are loaded on: whether this machine has it, a rank looks."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name as it is, or a usage error."""
        if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", value):
            self.fail(f"{value!r} is not cpu, cuda, or cuda:0", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Those that any machine may have."""
        return completions(("cpu", "cuda", "cuda:0"), incomplete)


def completions(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    """What a shell offers of some names behind what has been typed of one."""
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _declared(command: Callable[..., Any], *options: Declare) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command


def format_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--format`, as the argument `style`."""
    kinds = click.Choice(["text", "json"])
    return click.option("--format", "style", type=kinds, default="text", help="How to print the result.")(command)


def revision_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--revision`."""
    return click.option("--revision", help="Branch, tag or commit of a Hub id.")(command)


def strategies_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--strategies`, a path."""
    help = "Python file that registers styles of your own. It is run."
    return click.option("--strategies", type=click.Path(exists=True, dir_okay=False), help=help)(command)


# Of every command that loads a model.
_MODEL: tuple[Declare, ...] = (
    click.option(
        "--sdpa",
        "kernel",
        type=click.Choice(list(SDPA_BACKENDS)),
        help="Which of torch's kernels computes attention sdpa; no other in its place.  [default: torch chooses]",
    ),
    click.option("--attn", help="Attention implementation: sdpa, eager, flash_attention_2, flash_attention_3 …"),
    revision_option,
    click.option(
        "--device",
        type=Device(),
        metavar="cpu|cuda|cuda:N",
        help="cuda: a GPU for each rank. cuda:N: that one for all ranks, over gloo. [default: cuda where there is one]",
    ),
    click.option("--no-digests", is_flag=True, help="Do not check the digests of this rank's file, and of small ones."),
    click.option("--report", is_flag=True, help="Say on stderr what the load took, on rank 0 and on the slowest rank."),
    click.option(
        "--sequence-parallel",
        is_flag=True,
        help="Between a layer's blocks, each rank holds its slice of the sequence only: less memory for activations.",
    ),
    click.option(
        "--timeout",
        type=FiniteRange(min=0, min_open=True),
        default=1800,
        show_default=True,
        help="Seconds within which every rank must have loaded; the one that has not is named, and all end.",
    ),
    strategies_option,
)
_OUT = click.argument("out", type=click.Path())
_REPLICAS = click.option(
    "--dp",
    "dp_size",
    type=_POSITIVE,
    default=1,
    metavar="K",
    help="Replicas of the model, each of ranks in a row: K times as many processes as OUT has ranks.",
)
_GENERATE: tuple[Declare, ...] = (
    click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Text to continue; repeat it for a batch."),
    click.option(
        "--prompts", "file", type=click.Path(), metavar="FILE", help="File of prompts, one a line; - for stdin."
    ),
    click.option("--chat", is_flag=True, help="Answer by the chat template: each prompt, else lines of stdin in turn."),
    click.option("--max-new-tokens", type=_POSITIVE, default=32, show_default=True, help="Tokens of a text at most."),
    click.option("--temperature", type=FiniteRange(min=0), default=0, help="Sample, where it is over 0."),
    click.option("--top-p", type=FiniteRange(0, 1, min_open=True), help="Sample from the likeliest of that mass."),
    click.option("--top-k", type=click.IntRange(min=0), help="Sample from so many of the likeliest; 0 for all."),
    click.option("--seed", type=click.IntRange(0, (1 << 63) - 1), help="Sample the same again."),
    click.option("--stop", "stops", multiple=True, metavar="TEXT", help="End before this text; may be repeated."),
    click.option("--batch-size", type=_POSITIVE, default=16, show_default=True, help="Prompts continued at a time."),
    click.option("--cache", type=click.Choice(["dynamic", "static"]), help="KV cache.  [default: dynamic]"),
    click.option(
        "--compile", "compiled", type=click.Choice(_COMPILE_MODES), help="Compile decoding steps, with a static cache."
    ),
)
_CHECK: tuple[Declare, ...] = (
    click.option(
        "--reference",
        type=click.Path(),
        metavar="SOURCE",
        help="The checkpoint that OUT was made from. [default: stored logits]",
    ),
    click.option(
        "--per-layer",
        is_flag=True,
        help="Name the first module that computes something else, and why; where none does, altered parameters.",
    ),
)
_BENCH: tuple[Declare, ...] = (
    click.option("--batch", "batches", type=Batches(), default="1,2,4", show_default=True, help="Prompts at once."),
    click.option("--length", type=_POSITIVE, default=512, show_default=True, help="Tokens of a prompt."),
    click.option("--steps", type=click.IntRange(min=0), default=8, show_default=True, help="Tokens decoded behind it."),
    click.option("--compile", "compiled", is_flag=True, help="Compiled too, prefill and decode."),
    click.option("--repeat", type=_POSITIVE, default=3, show_default=True, help="Jobs of each kind, in turn."),
    click.option(
        "--against",
        type=click.Choice(ENGINES),
        multiple=True,
        help="Measure this too, on as many ranks. Repeatable.",
    ),
    click.option("--source", type=click.Path(), metavar="SOURCE", help="The checkpoint, for --against."),
    click.option(
        "--plot",
        type=click.Path(),
        metavar="FILE",
        help="Draw the speed-up against the batch size: .png, .svg or .pdf.",
    ),
)


def generate_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `reshard run` takes, and `generate` of a rank."""
    return _declared(command, _OUT, *_GENERATE, _REPLICAS, *_MODEL, format_option)


def check_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `check` takes."""
    return _declared(command, _OUT, *_CHECK, _REPLICAS, *_MODEL, format_option)


def bench_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `bench` takes."""
    outs = click.argument("outs", nargs=-1, required=True, metavar="OUT…", type=click.Path())
    return _declared(command, outs, *_BENCH, *_MODEL, format_option)


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a job of `bench` is told besides: the engine, the folder whose ranks these are, and where rank 0 leaves what
    it measured."""
    names = (["--engine", "engine"], ["--on", "folder"], ["--result", "result"])
    return _declared(command, *(click.option(*name, hidden=True) for name in names))

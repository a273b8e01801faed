"""The options of the commands that run on ranks, each declared once: for `reshard run`, `check`, `bench` and a rank.

Kernels of torch and engines are given here by name only, since torch and transformers are slow to import.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..checkpoint.quantization import COMPUTE

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

# Kernels of torch's attention, and their names in torch.nn.attention.SDPBackend.
SDPA_BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "mem-efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "math": "MATH",
}
ENGINES = ("tensor_parallel", "transformers")  # that `bench` can measure beside this runtime
_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
_POSITIVE = click.IntRange(min=1)


class FiniteRange(click.FloatRange):
    """A range of finite numbers: `nan` and `inf` are refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number, or fail with a usage error."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return float(number)


class Batches(click.ParamType):
    """Batch sizes: 1,2,4."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the numbers of a text such as 1,2,4, sorted."""
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and int(part) for part in parts):
            self.fail(f"{value!r} is not a list of batch sizes such as 1,2,4", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


class Device(click.ParamType):
    """A kind of device that models are loaded on. A rank checks whether the machine has it."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name unchanged, or fail with a usage error."""
        if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", value):
            self.fail(f"{value!r} is not cpu, cuda, or cuda:0", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the devices that any machine may have."""
        return completions(("cpu", "cuda", "cuda:0"), incomplete)


def completions(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    """Return the names that a shell offers after what has been typed of one."""
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _declared(command: Callable[..., Any], *options: Declare) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command


def format_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Declare `--format`, as the argument `style`."""
    kinds = click.Choice(["text", "json"])
    return click.option("--format", "style", type=kinds, default="text", help="How to print the result.")(command)


def revision_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Declare `--revision`."""
    return click.option("--revision", help="Branch, tag or commit of a Hub id.")(command)


def strategies_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Declare `--strategies`, a path."""
    help = "Python file that registers styles of your own. It is run."
    return click.option("--strategies", type=click.Path(exists=True, dir_okay=False), help=help)(command)


# Options of every command that loads a model.
_MODEL: tuple[Declare, ...] = (
    click.option(
        "--sdpa",
        "kernel",
        type=click.Choice(list(SDPA_BACKENDS)),
        help="Kernel of torch that computes attention sdpa; no other replaces it.  [default: torch chooses]",
    ),
    click.option("--attn", help="Attention implementation: sdpa, eager, flash_attention_2, flash_attention_3 …"),
    revision_option,
    click.option(
        "--device",
        type=Device(),
        metavar="cpu|cuda|cuda:N",
        help="cuda: one GPU for each rank. cuda:N: GPU N for all ranks, over gloo.  [default: cuda if there is one]",
    ),
    click.option("--no-digests", is_flag=True, help="Do not check the digests of the rank files and the small files."),
    click.option(
        "--report", is_flag=True, help="Print on stderr how long the load took on rank 0 and on the slowest rank."
    ),
    click.option(
        "--sequence-parallel",
        is_flag=True,
        help="Each rank holds only its slice of the sequence between a layer's blocks. Activations take less memory.",
    ),
    click.option(
        "--timeout",
        type=FiniteRange(min=0, min_open=True),
        default=1800,
        show_default=True,
        help="Seconds that every rank has to load. If one takes longer, it is named and all end.",
    ),
    strategies_option,
)
_COMPUTE = (
    "native: a library computes with quantized weights as they are. dequantised: they are plain ones in memory. auto:"
    " native where the library is installed and can."
)
_COMPUTED = click.option("--compute", type=click.Choice(COMPUTE), default=COMPUTE[0], show_default=True, help=_COMPUTE)
_COMPARED = click.option(
    "--compute",
    "computes",
    type=click.Choice(COMPUTE),
    multiple=True,
    default=COMPUTE[:1],
    help=f"{_COMPUTE} Repeat it to compare.",
)
_OUT = click.argument("out", type=click.Path())
_REPLICAS = click.option(
    "--dp",
    "dp_size",
    type=_POSITIVE,
    default=1,
    metavar="K",
    help="Replicas of the model, each on consecutive ranks: K times as many processes as OUT has ranks.",
)
_GENERATE: tuple[Declare, ...] = (
    click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Text to continue. Repeat it for a batch."),
    click.option(
        "--prompts", "file", type=click.Path(), metavar="FILE", help="File of prompts, one per line; - for stdin."
    ),
    click.option(
        "--chat", is_flag=True, help="Answer with the chat template: each prompt, or else each line of stdin."
    ),
    click.option(
        "--max-new-tokens", type=_POSITIVE, default=32, show_default=True, help="Most tokens to generate for a text."
    ),
    click.option(
        "--temperature",
        type=FiniteRange(min=0),
        default=0,
        help="Sample if above 0. At 0, the default, decode greedily.",
    ),
    click.option(
        "--top-p",
        type=FiniteRange(0, 1, min_open=True),
        help="Sample from the likeliest tokens whose probabilities sum to this.",
    ),
    click.option(
        "--top-k", type=click.IntRange(min=0), help="Sample from this many of the likeliest tokens; 0 for all."
    ),
    click.option(
        "--seed", type=click.IntRange(0, (1 << 63) - 1), help="Seed of the sampling. The same seed gives the same text."
    ),
    click.option("--stop", "stops", multiple=True, metavar="TEXT", help="End before this text. Repeat it for more."),
    click.option("--batch-size", type=_POSITIVE, default=16, show_default=True, help="Prompts continued at a time."),
    click.option("--cache", type=click.Choice(["dynamic", "static"]), help="KV cache.  [default: dynamic]"),
    click.option(
        "--compile", "compiled", type=click.Choice(_COMPILE_MODES), help="Compile decoding steps. Uses a static cache."
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
        help="Name the first module whose output differs, and why. If none differs, name altered parameters.",
    ),
)
_BENCH: tuple[Declare, ...] = (
    click.option(
        "--batch", "batches", type=Batches(), default="1,2,4", show_default=True, help="Batch sizes to measure."
    ),
    click.option("--length", type=_POSITIVE, default=512, show_default=True, help="Tokens of a prompt."),
    click.option(
        "--steps", type=click.IntRange(min=0), default=8, show_default=True, help="Tokens to decode after the prompt."
    ),
    click.option("--compile", "compiled", is_flag=True, help="Also measure prefill and decode compiled."),
    click.option("--repeat", type=_POSITIVE, default=3, show_default=True, help="Jobs of each kind, run in turn."),
    click.option(
        "--against",
        type=click.Choice(ENGINES),
        multiple=True,
        help="Also measure this, on as many ranks. Repeat it for more.",
    ),
    click.option("--source", type=click.Path(), metavar="SOURCE", help="The checkpoint that --against runs."),
    click.option(
        "--plot",
        type=click.Path(),
        metavar="FILE",
        help="Draw the speed-up against the batch size into FILE: .png, .svg or .pdf.",
    ),
)


def generate_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Declare what `reshard run` takes, and `reshard-rank generate`."""
    return _declared(command, _OUT, *_GENERATE, _REPLICAS, *_MODEL, _COMPUTED, format_option)


def check_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Declare what `check` takes."""
    return _declared(command, _OUT, *_CHECK, _REPLICAS, *_MODEL, _COMPUTED, format_option)


def bench_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Declare what `bench` takes."""
    outs = click.argument("outs", nargs=-1, required=True, metavar="OUT…", type=click.Path())
    return _declared(command, outs, *_BENCH, *_MODEL, _COMPARED, format_option)


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Declare what only a job of `bench` takes: the engine, the folder of its ranks, what computes with quantized
    weights, and rank 0's result file."""
    names = (["--engine", "engine"], ["--on", "folder"], ["--computed", "compute"], ["--result", "result"])
    return _declared(command, *(click.option(*name, hidden=True) for name in names))

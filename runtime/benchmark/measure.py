"""Measurements of a model on these ranks: start, prefill, decode and memory, by the same rules for every engine."""

from __future__ import annotations

import inspect
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from reshard.launch.benchmark.measured import Measured, Point, Settings

from ..distributed.ranks import this_rank
from .engines import Engine

__all__ = ["measure"]

_RUNS = 3  # timed runs of each kind, in turn, after one that warms up


def measure(engine: Engine, settings: Settings) -> Measured:
    """Load and run a model. Call it on every rank. Times are this rank's; memory is the largest of all ranks."""
    start = time.perf_counter()
    model = engine.load()
    load = time.perf_counter() - start
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    length = _length(model, settings)
    prompts = {batch: _prompt(model, batch, length) for batch in settings.batches}
    with torch.inference_mode():
        _prefill(model, model, prompts[settings.batches[0]])
        _wait(model)
        first_token = _since_start()
        points = _points(model, settings, prompts)
    return Measured(
        engine=engine.name,
        ranks=engine.ranks,
        model=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        device=_device(model),
        threads=torch.get_num_threads(),
        length=length,
        load=load,
        parts=dict(getattr(model, "reshard_seconds", {})),
        first_token=first_token,
        memory=_memory(model),
        points=points,
    )


def _length(model: Any, settings: Settings) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return max(1, min(settings.length, limit - settings.steps)) if isinstance(limit, int) else settings.length


def _prompt(model: Any, batch: int, length: int) -> torch.Tensor:
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(0, size, (batch, length), generator=torch.Generator().manual_seed(batch))
    return ids.to(model.device)


def _points(model: Any, settings: Settings, prompts: dict[int, torch.Tensor]) -> tuple[Point, ...]:
    """Run every batch size, eager and compiled, in turn, so that other load on the machine meets all alike."""
    forwards = {False: model, **({True: torch.compile(model)} if settings.compiled else {})}
    steps = settings.steps if model.can_generate() and not model.config.is_encoder_decoder else 0
    prefill: dict[tuple[int, bool], list[float]] = {(b, c): [] for b in prompts for c in forwards}
    decode: dict[tuple[int, bool], list[float]] = {kind: [] for kind in prefill}
    for turn in range(1 + _RUNS):
        for (batch, compiled), took in prefill.items():
            forward = forwards[compiled]
            seconds, output = _timed(model, lambda: _prefill(model, forward, prompts[batch]))  # noqa: B023
            stepped = _steps(model, forward, output, prompts[batch], steps)
            if turn:  # the first turn compiles, for every shape: all turns have the same
                took.append(seconds)
                decode[batch, compiled] += stepped
    return tuple(
        Point(batch, compiled, statistics.median(took), _median(decode[batch, compiled]))
        for (batch, compiled), took in prefill.items()
    )


def _prefill(model: Any, forward: Any, ids: torch.Tensor) -> Any:
    accepted = inspect.signature(model.forward).parameters
    options = {"use_cache": True, "logits_to_keep": 1}
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return forward(ids, **inputs, **{name: value for name, value in options.items() if name in accepted})


def _steps(model: Any, forward: Any, output: Any, ids: torch.Tensor, steps: int) -> list[float]:
    """Return the seconds of each step of one token, with all earlier tokens in the cache."""
    from ..generation.generate import CACHE  # imported late, since the start is measured too

    token, found = ids[:, :1], []
    for _ in range(steps):
        options = {CACHE: output[CACHE], "use_cache": True}
        seconds, output = _timed(model, lambda: forward(token, **options))  # noqa: B023
        token = output.logits[:, -1:].argmax(-1)
        found.append(seconds)
    return found


def _timed(model: Any, run: Any) -> tuple[float, Any]:
    _wait(model)
    start = time.perf_counter()
    output = run()
    _wait(model)
    return time.perf_counter() - start, output


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _device(model: Any) -> str:
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"


def _memory(model: Any) -> int:
    mine = torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else _anonymous()
    if not dist.is_initialized():
        return mine
    everyone: list[Any] = [None] * this_rank().world_size
    dist.all_gather_object(everyone, mine)
    return max(everyone)


def _anonymous() -> int:
    """Return the bytes of this process's anonymous memory (not of files); 0 if the system does not tell."""
    path = Path("/proc/self/smaps_rollup")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:")), 0)


def _since_start() -> float | None:
    """Return the seconds since this process began, imports included; None if the system does not tell."""
    path = Path("/proc/self/stat")
    if not path.exists():
        return None
    began = int(path.read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")  # since boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began

"""The engines that a benchmark runs a model with: this runtime, and those it is compared with."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reshard.checkpoint.architecture import model_class, quiet_transformers
from reshard.errors import BadInputError

__all__ = ["PEERS", "Engine", "peer"]

_TRIAL = 60  # seconds for a first forward of a few tokens


@dataclass(frozen=True, slots=True)
class Engine:
    """A name, the number of ranks it runs on, and the function that loads the model on each."""

    name: str
    ranks: int
    load: Callable[[], Any]


def peer(name: str, root: Path, ranks: int, dtype: str) -> Engine:
    """Return the engine `name` of `PEERS`, for the checkpoint in `root`."""
    return Engine(name, ranks, lambda: PEERS[name](root, ranks, getattr(torch, dtype)))


def _transformers(root: Path, _ranks: int, dtype: torch.dtype) -> Any:
    """Load with transformers' own tensor parallelism."""
    family: Any = model_class(root)[0]
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about another spelling of tp_plan, which the oldest release does not know
        return family.from_pretrained(root, tp_plan="auto", dtype=dtype).eval()


def _tensor_parallel(root: Path, ranks: int, dtype: torch.dtype) -> Any:
    """Load with the package `tensor_parallel`: threads of one process.

    It can wait for ever for a thread that has failed, so a trial forward must end within `_TRIAL` seconds.
    """
    try:
        import tensor_parallel
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "tensor_parallel"
        hint = "pip install tensor_parallel" if absent else None  # else it is installed, but its own imports fail
        raise BadInputError(f"it cannot be imported: {error}", hint=hint) from None
    family: Any = model_class(root)[0]
    devices = [f"cuda:{rank}" for rank in range(ranks)] if torch.cuda.is_available() else ["cpu"] * ranks
    with quiet_transformers():
        single = family.from_pretrained(root, dtype=dtype, attn_implementation="eager").eval()
        model = tensor_parallel.tensor_parallel(single, devices)
    before = signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(_TRIAL)
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 4, dtype=torch.long, device=devices[0]), use_cache=True)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return model


def _give_up(*_: object) -> None:
    raise BadInputError(f"its first forward does not end within {_TRIAL} s")


PEERS: dict[str, Callable[[Path, int, torch.dtype], Any]] = {
    "transformers": _transformers,
    "tensor_parallel": _tensor_parallel,
}

"""Checks of the Python interface's arguments, by name: a name means the same in every public function."""

from __future__ import annotations

import functools
import inspect
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from ..checkpoint.quantization import COMPUTE, QUANTIZATIONS
from ..errors import UsageError
from ..files.dtypes import cache_dtype, floating_dtype
from ..text import printable

__all__ = ["CHECKS", "checked"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def checked(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Check the arguments of a public function before it does anything. Raises UsageError, which names the argument.

    A value that can be written in several ways (a dtype, a path) reaches the function in one form. None passes if it is
    the default.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checking(*arguments: _P.args, **named: _P.kwargs) -> _R:
        try:
            given = signature.bind(*arguments, **named)
        except TypeError as error:
            raise TypeError(f"{function.__name__}: {error}") from None
        for name, value in given.arguments.items():
            if name not in CHECKS or (value is None and signature.parameters[name].default is None):
                continue
            try:
                given.arguments[name] = CHECKS[name](value)
            except (TypeError, ValueError) as error:
                raise UsageError(f"{function.__name__}: {name} is {_shown(value)}", hint=f"give {error}") from None
        return function(*given.args, **given.kwargs)

    return checking


def _shown(value: object) -> str:
    plain = value is None or isinstance(value, (str, int, float)) or type(value).__name__ in ("dtype", "type")
    return printable(repr(value) if plain else type(value), 80)


def _known(right: bool, words: str) -> None:
    if not right:
        raise ValueError(words)


def _path(value: Any) -> str | Path:
    words = "a folder, a Hub id or a URL"
    _known(isinstance(value, (str, os.PathLike)), words)
    path = os.fspath(value)
    _known(isinstance(path, str) and path != "", words)
    return path if isinstance(value, str) else Path(path)


def _folder(value: Any) -> str | Path:
    _known("\0" not in str(value), "a name that a folder can have")
    return _path(value)


def _text(value: Any) -> str:
    _known(isinstance(value, str) and value != "", "a text")
    return str(value)


def _flag(value: Any) -> bool:
    _known(isinstance(value, bool), "True or False")
    return bool(value)


def _count(words: str) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        try:
            number = operator.index(value)
        except TypeError:
            number = 0
        _known(number >= 1 and not isinstance(value, bool), f"{words}, at least 1")
        return number

    return check


def _memory(value: Any) -> int:
    words = "a number of bytes, such as 24e9"
    _known(isinstance(value, (int, float)) and not isinstance(value, bool), words)
    _known(math.isfinite(value) and value >= 1 and value == int(value), words)
    return int(value)


def _seconds(value: Any) -> float:
    words = "a number of seconds, more than 0"
    _known(isinstance(value, (int, float)) and not isinstance(value, bool), words)
    _known(math.isfinite(value) and value > 0, words)
    return float(value)


def _part(value: Any) -> float:
    words = "a part of the memory, more than 0 and at most 1"
    _known(isinstance(value, (int, float)) and not isinstance(value, bool), words)
    _known(0 < value <= 1, words)
    return float(value)


def _rules(value: Any) -> Any:
    words = '"auto", "general", rules (pattern → style), or the file that holds them'
    if isinstance(value, Mapping):
        _known(all(isinstance(text, str) for rule in value.items() for text in rule), words)
        return value
    _known(isinstance(value, (str, os.PathLike)), words)
    return _path(value)


def _strategies(value: Any) -> Any:
    from ..strategies.registry import ParallelInterface

    words = "the Python file that registers them, or a ParallelInterface"
    if isinstance(value, ParallelInterface):
        return value
    _known(isinstance(value, (str, os.PathLike)), words)
    return _path(value)


def _file(value: Any) -> str | Path:
    words = "the path of a file"
    _known(isinstance(value, (str, os.PathLike)) and "\0" not in str(value), words)
    _known(isinstance(os.fspath(value), str) and os.fspath(value) != "", words)
    return value if isinstance(value, str) else Path(value)


def _capability(value: Any) -> tuple[int, int]:
    words = "a compute capability, such as (9, 0)"
    _known(isinstance(value, (tuple, list)) and len(value) == 2, words)
    _known(all(type(part) is int and 0 <= part < 100 for part in value), words)
    return value[0], value[1]


def _ranks(value: Any) -> list[int]:
    words = "numbers of ranks, such as range(4)"
    _known(isinstance(value, Iterable) and not isinstance(value, (str, bytes)), words)
    ranks = list(value)
    _known(not any(isinstance(rank, bool) for rank in ranks), words)
    try:
        return [operator.index(rank) for rank in ranks]
    except TypeError:
        raise ValueError(words) from None


def _texts(value: Any) -> tuple[str, ...]:
    _known(isinstance(value, Iterable) and not isinstance(value, (str, bytes)), "a list of texts")
    return tuple(_text(item) for item in value)


def _folders(value: Any) -> tuple[str | Path, ...]:
    _known(isinstance(value, Iterable) and not isinstance(value, (str, bytes, os.PathLike)), "a list of folders")
    return tuple(_folder(item) for item in value)


def _function(value: Any) -> Any:
    _known(callable(value), "a function; reshard.process.Progress says what it is called with")
    return value


def _device(value: Any) -> str:
    words = "cpu, cuda or cuda:N"
    _known(isinstance(value, str) or type(value).__name__ == "device", words)
    _known(str(value) != "", words)
    return str(value)


def _compute(value: Any) -> str:
    _known(isinstance(value, str) and value in COMPUTE, f"one of {', '.join(COMPUTE)}")
    return str(value)


def _mesh(value: Any) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    _known(isinstance(value, DeviceMesh), "a DeviceMesh of torch")
    return value


def _kind(value: Any) -> str:
    _known(isinstance(value, str) and value in QUANTIZATIONS, f"one of {', '.join(QUANTIZATIONS)}")
    return str(value)


def _options(value: Any) -> Any:
    words = "options of transformers' configuration (name → value), or the JSON file that holds them"
    if isinstance(value, Mapping):
        _known(all(isinstance(name, str) for name in value), words)
        return value
    _known(isinstance(value, (str, os.PathLike)), words)
    return _file(value)


_RANKS = _count("a number of ranks")

CHECKS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("source", "place", "against", "like"), _path),
    **dict.fromkeys(("out", "dest", "to"), _folder),
    **dict.fromkeys(("revision", "layout", "licence", "attn_implementation", "weights", "part"), _text),
    **dict.fromkeys(("engine", "platform", "moe_backend"), _text),
    **dict.fromkeys(("engine_python", "plan"), _file),
    "capability": _capability,
    **dict.fromkeys(("tp_size", "ep_size"), _RANKS),
    "quantize": _kind,
    "quantize_config": _options,
    **dict.fromkeys(("quantize_experts", "dequantize"), _flag),
    **dict.fromkeys(("drop_unused", "ep", "overwrite", "keep_cache", "reference_logits", "sync"), _flag),
    **dict.fromkeys(("private", "create_pr", "dry_run", "check_digests", "sequence_parallel"), _flag),
    **dict.fromkeys(("progress", "say"), _function),
    "dp_size": _count("a number of replicas"),
    "pipeline_size": _count("a number of stages"),
    "workers": _count("a number of threads"),
    "gpu_memory": _memory,
    "max_model_len": _count("a number of tokens"),
    "batch_size": _count("a number of sequences"),
    "utilization": _part,
    "kv_dtype": cache_dtype,
    "timeout": _seconds,
    "dtype": floating_dtype,
    "tp_plan": _rules,
    "strategies": _strategies,
    "include": _texts,
    "links_into": _folders,
    "ranks": _ranks,
    "device": _device,
    "compute": _compute,
    "mesh": _mesh,
}

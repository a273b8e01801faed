"""Run a planner in the engine's environment: alone, in an empty folder, without secrets, with limits."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInputError, UsageError
from ..files.dtypes import torch_name
from ..files.header import TensorInfo
from ..files.untrusted import vetted_path
from ..text import printable
from .copy_plan import CopyPlan

__all__ = ["Asked", "python_of_engine", "traced"]

_PLANNER = Path(__file__).parent / "vllm_planner"
_SECONDS = 1800
_MEMORY = 64 << 30  # bytes of data
_KEPT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "CUDA_HOME", "TMPDIR")  # of the environment's variables
_SET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_PLUGINS": "",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
_ERROR = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Refusal|Interrupt)): (.+)$")


@dataclass(frozen=True, slots=True)
class Asked:
    """What rank files are for: the numbers of ranks along each axis, and what the engine is to choose.

    `platform` is "cuda" for a GPU of compute `capability` (major, minor), and None for the machine's own. `dtype` and
    `moe_backend` are the engine's words; None leaves the choice to it.
    """

    tp: int
    pp: int = 1
    ep: bool = False
    platform: str | None = None
    capability: tuple[int, int] | None = None
    dtype: str | None = None
    moe_backend: str | None = None


def python_of_engine(given: str | Path | None) -> Path:
    """Return the Python that has vLLM: the `given` one, or this one. Raises UsageError if there is none."""
    if given is None:
        if importlib.util.find_spec("vllm") is None:
            raise UsageError(
                "vLLM is not installed here, and its loader says where each element belongs",
                hint="give the Python of an environment that has it: --engine-python PATH/bin/python",
            )
        return Path(sys.executable)
    path = Path(os.path.abspath(given))  # not what it links to: that would be outside its environment
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise UsageError(f"{printable(given)}: no Python to run", hint="--engine-python PATH/bin/python")
    return path


def traced(
    asked: Asked, tensors: Mapping[str, TensorInfo], root: Path, files: Iterable[str], *, python: Path
) -> CopyPlan:
    """Have the engine of `python` plan a checkpoint that has `tensors`, and in `root` the small `files`.

    Raises BadInputError, which has the engine's last words, if it makes no plan.
    """
    with tempfile.TemporaryDirectory(prefix="reshard-plan-") as name:
        folder = Path(name)
        (folder / "model").mkdir()
        for file in files:
            if file.endswith(".json") and "/" not in file:
                shutil.copyfile(vetted_path(root, file, what="source"), folder / "model" / file)
        listed = {info.name: (torch_name(info.dtype, tensor=info.name), info.shape) for info in tensors.values()}
        (folder / "request.json").write_text(json.dumps({**asdict(asked), "tensors": listed}))
        _run([str(python), "-P", "-s", str(_PLANNER), name], folder)
        return CopyPlan.read(folder / "plan.jsonl")


def _run(command: list[str], folder: Path) -> None:
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    environment |= {**_SET, "HOME": str(folder), "HF_HOME": str(folder), "VLLM_CACHE_ROOT": str(folder)}
    with open(folder / "said", "wb") as said, _started(command, folder, environment, said) as process:
        try:
            code = process.wait(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            raise BadInputError(f"vLLM made no plan within {_SECONDS} s") from None
    if code or not (folder / "plan.jsonl").is_file():
        raise _refusal(folder / "said", code)


@contextmanager
def _started(
    command: list[str], folder: Path, environment: Mapping[str, str], said: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in a session of its own, which ends with the context, whatever it has started itself."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=said,
        start_new_session=True,
        preexec_fn=_limited,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _limited() -> None:
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (min(_MEMORY, hard) if hard >= 0 else _MEMORY, hard))


def _refusal(path: Path, code: int) -> BadInputError:
    """Return the error for a planner that made no plan, with the last words that it said."""
    lines = path.read_text(errors="replace").splitlines()
    plain = [re.sub(r"^\[rank\d+\]: ", "", line).strip() for line in lines]
    found = [(at, match) for at, line in enumerate(plain) if (match := _ERROR.match(line))]
    if not found:
        last = next((line for line in reversed(lines) if line.strip()), "")
        return BadInputError(f"vLLM ended with code {code}: {printable(last, 300)}")
    at, match = found[-1]
    kind, words = match.groups()
    if kind == "ValidationError":  # pydantic's: what is wrong is on the next line
        words = "".join(plain[at + 1 : at + 2]).removeprefix("Value error, ").partition(" [type=")[0] or words
    if kind == "ModuleNotFoundError" and "'vllm'" in words:
        return BadInputError(
            "that Python has no vLLM", hint="--engine-python takes the Python of the environment that has it"
        )
    return BadInputError(
        f"vLLM makes no plan: {kind}: {printable(words, 300)}", hint="its own loader would end in the same way"
    )

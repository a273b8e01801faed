"""A stand-in for Python that starts in a twentieth of a second: it forks the warm process of `warm_ranks`.

`python()` is an executable file. Beside it are `reshard`, `reshard-rank` and `torchrun`. They take the place of the
real ones wherever a test starts a process to see what a command does, and not how Python comes up. The process that
runs the command has its own environment, folder, files and exit code, and it can be sent signals. The processes it
starts with `sys.executable` are forked as well.

Python itself runs whatever the warm process cannot: other modules, and commands with other variables that a library
reads when it is imported. The variables of the Hub's client are such variables too, but can be followed: the warm
process has placeholders for the Hub's place, which are replaced after the fork, and the client's constants are computed
anew (`own_hub`). tests/house/test_warm_commands.py shows that they are those of a fresh process.

Differences from a fresh process: torch has one thread; the parent, the session and the process group are the warm
process's; and the warm process has imported what a command may import later, or never.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

HOME = "/placeholder-of-the-hubs-home"
ENDPOINT = "http://placeholder-of-the-hub.invalid"
_HUB = "https://huggingface.co"
_SCRIPTS = {
    "reshard": ["-m", "reshard"],
    "reshard-rank": ["-P", "-m", "reshard.launch.rank"],
    "torchrun": ["-m", "torch.distributed.run"],
}
_MODULES = {"reshard", "reshard.launch.rank", "runtime", "torch.distributed.run"}
_RELAYED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
# Variables that Python, torch or the Hub's client read when they start, but for those that a fork can follow.
_READ_AT_START = ("PYTHON", "HF_", "HUGGING", "TRANSFORMERS_", "TORCH_", "LC_", "LANG", "LD_")
_FOLLOWED = {
    *("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "HF_HOME", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"),
    *("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS", "TORCH_CPP_LOG_LEVEL", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
}


def python() -> str:
    """Return the path of the stand-in for `sys.executable`. It works until this process ends."""
    import warm_ranks

    return str(Path(warm_ranks.server()).with_name("bin") / "python")


def install(place: str) -> None:
    """Write the stand-ins, beside the socket of a warm process that starts with the environment of this one."""
    bin_folder = Path(place).with_name("bin")
    bin_folder.mkdir()
    path = subprocess.check_output([sys.executable, "-Ic", "import json, sys; print(json.dumps(sys.path))"])
    known = json.dumps([place, sys.executable, json.loads(path), _read_at_start(os.environ)])
    for name in ("python", *_SCRIPTS):
        (bin_folder / name).write_text(
            f"#!{sys.executable} -IS\n"
            f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n"
            f"import warm_commands\nwarm_commands.stand_in(*{known})\n"
        )
        (bin_folder / name).chmod(0o755)


def own_id(process: subprocess.Popen[Any]) -> int:
    """Return the id of the process that runs the command which `process` stands for, once it has begun.

    A kill of `process` itself ends the command a moment later.
    """
    return int(Path(f"/proc/{process.pid}/comm").read_text())


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value for name, value in environment.items() if name.startswith(_READ_AT_START) and name not in _FOLLOWED
    }


def stand_in(place: str, real_python: str, base_path: list[str], read_at_start: dict[str, str]) -> NoReturn:
    """Run the words of this process as Python would, in a fork of the warm process if that can."""
    arguments = [*_SCRIPTS.get(Path(sys.argv[0]).name, ()), *sys.argv[1:]]
    rest = list(itertools.dropwhile(lambda word: word in ("-u", "-P"), arguments)) or [""]
    options = arguments[: -len(rest)]
    if rest[0] in ("-m", "-c"):
        can = len(rest) > 1 and (rest[1] in _MODULES if rest[0] == "-m" else "multiprocessing" not in rest[1])
    else:
        can = rest[0].endswith(".py")
    if not can or "HF_HOME" not in os.environ or _read_at_start(os.environ) != read_at_start:
        os.execv(real_python, [real_python, *arguments])
    given = os.environ.get("PYTHONPATH")
    path = [*(given.split(os.pathsep) if given else []), *base_path]
    if "-P" not in options and not os.environ.get("PYTHONSAFEPATH"):
        here = {"-m": os.getcwd(), "-c": ""}
        path.insert(0, here[rest[0]] if rest[0] in here else str(Path(rest[0]).absolute().parent))
    job = {
        "arguments": rest,
        "environment": dict(os.environ),
        "path": path,
        "folder": os.getcwd(),
        "executable": str(Path(sys.argv[0]).with_name("python")),
        "unbuffered": "-u" in options or bool(os.environ.get("PYTHONUNBUFFERED")),
    }
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(place)
        socket.send_fds(line, [json.dumps(job).encode() + b"\n"], [0, 1, 2])
        answers = line.makefile()
        pid = int(answers.readline())
        Path("/proc/self/comm").write_text(str(pid))  # for `own_id`

        def relay(number: int, _: object) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

        for number in _RELAYED:
            signal.signal(number, relay)
        [code] = json.loads(answers.readline() or "[1]")
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def own_hub() -> Callable[[], None]:
    """Find where the libraries keep the placeholders. The function returned puts the environment's values there."""
    constants = sys.modules["huggingface_hub.constants"]
    places = [
        (module.__dict__, name)
        for module in list(sys.modules.values())
        for name, value in list(getattr(module, "__dict__", {}).items())
        if module.__name__ != __name__ and type(value) in (str, tuple, frozenset) and "placeholder-of-" in str(value)
    ]
    assert len(places) > 10
    copies = [
        (module.__dict__, name)
        for module_name, module in list(sys.modules.items())
        for name, value in vars(constants).items()
        if module_name.startswith("huggingface_hub.") and name.isupper() and vars(module).get(name, module) is value
    ]

    def put() -> None:
        cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        home = os.environ.get("HF_HOME", os.path.join(cache, "huggingface"))
        endpoint = os.environ.get("HF_ENDPOINT", _HUB).rstrip("/")
        for names, name in places:
            names[name] = _with_values(names[name], home, endpoint)
        importlib.reload(constants)  # for what it computes of all variables
        for names, name in copies:
            names[name] = getattr(constants, name)
        urllib.parse.clear_cache()

    return put


def _with_values(value: Any, home: str, endpoint: str) -> Any:
    if isinstance(value, str):
        return value.replace(HOME, home).replace(ENDPOINT, endpoint)
    if value == _origin(ENDPOINT):
        return _origin(endpoint)
    return type(value)(_with_values(one, home, endpoint) for one in value) if isinstance(value, frozenset) else value


def _origin(url: str) -> tuple[str, str, int]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}[parts.scheme]

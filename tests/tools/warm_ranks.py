"""Jobs of several ranks without the start of Python, torch and transformers in each: processes forked from a warm one.

    warm_ranks.py SOCKET

The warm process imports what a rank needs and runs no operation, so it has no threads of torch that a fork would lose.
For each job it forks an agent, which forks a process for the ranks' store and one for each rank: the first failure ends
the rest. Differences from torchrun: ranks share one seed of `hash`, and the job has no run id.

A command is a job of one process without a store (`warm_commands`).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import warm_commands

# What commands and ranks import sooner or later.
_NEEDED = (
    *("transformers.generation.utils", "transformers.masking_utils", "transformers.modeling_utils"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
    *("transformers.models.llama.modeling_llama", "torch.distributed.launcher.api", "reshard.cli.main"),
    *(
        "reshard.operations.convert.convert",
        "s3fs",
        "runtime.commands.bench",
        "runtime.commands.check",
        "runtime.commands.generate",
    ),
    *("torch._dynamo.backends.debugging", "torch._functorch.aot_autograd", "torch._dynamo.repro.after_aot"),
)
_MEETING = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
_DIGITS = 5  # digits of a port
NETWORK = "WARM_NETWORK"  # the variable that names the network namespace of a process: a file
_CLONE_NEWNET = 0x40000000  # of sched.h
_GRACE = 3.0  # seconds that ranks have to end by themselves when another has failed


class Done(subprocess.CompletedProcess[str]):
    """A job that has ended: `returncode` is torchrun's, `codes` are the ranks' own, negative if a signal ended one."""

    codes: list[int]


def run(
    world_size: int,
    *arguments: str,
    timeout: float,
    environment: Mapping[str, str] = os.environ,
    files: tuple[int, int, int] | None = None,
) -> Done:
    """Run `python ARGUMENTS` on each of `world_size` ranks, and return when all have ended, with what they printed.

    With `files`, three descriptors, they read and print there instead.
    """
    with open(os.devnull) as nothing, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given = files or (nothing.fileno(), out.fileno(), err.fileno())
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(server())
            line.settimeout(timeout)
            first = os.getcwd() if arguments[0] == "-m" else str(Path(arguments[0]).parent)
            job = {
                "world_size": world_size,
                "arguments": arguments,
                "environment": {**environment, "OMP_NUM_THREADS": "1"},
                "path": [first, *sys.path],
                "executable": sys.executable,
                "folder": os.getcwd(),
            }
            socket.send_fds(line, [json.dumps(job).encode() + b"\n"], given)
            try:
                codes = json.loads(line.makefile().readline() or "[1]")
            except TimeoutError:
                raise subprocess.TimeoutExpired(list(arguments), timeout) from None
        out.seek(0)
        err.seek(0)
        done = Done(arguments, int(any(codes)), out.read().decode(), err.read().decode())
        done.codes = codes
        return done


@functools.cache
def server() -> str:
    """Start the warm process, once for this process, with which it ends. Return its socket."""
    folder = tempfile.mkdtemp(prefix="reshard-warm-")
    place = f"{folder}/socket"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"HF_HOME": warm_commands.HOME, "HF_ENDPOINT": warm_commands.ENDPOINT}
    environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the launcher sets it
    warm_commands.install(place)
    process = subprocess.Popen([sys.executable, __file__, place], env=environment, stdin=subprocess.PIPE)

    def end() -> None:
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    until = time.monotonic() + 120
    while not os.path.exists(place):
        assert process.poll() is None, "the warm process has ended"
        assert time.monotonic() < until, "the warm process does not come up"
        time.sleep(0.02)
    return place


def _serve(place: str) -> None:
    import select

    import torch
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    for name in _NEEDED:
        importlib.import_module(name)
    # The launcher looks through all modules for a name that it does not log: 2 seconds with as many as there are here.
    dynamic_rendezvous.get_method_name = lambda depth=2: "unnamed"  # type: ignore[assignment]
    own_hub = warm_commands.own_hub()
    assert not torch.distributed.is_initialized()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{place}.new")
        server.listen()
        os.rename(f"{place}.new", place)
        while True:
            ready, _, _ = select.select([server, sys.stdin], [], [])
            with contextlib.suppress(ChildProcessError):  # agents leave no zombies, and their time counts
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if sys.stdin in ready:  # the process that started this one has ended
                return
            line, _ = server.accept()
            with line:
                if os.fork() == 0:
                    server.close()
                    _agent(line, own_hub)


def _agent(line: socket.socket, own_hub: Callable[[], None]) -> None:
    text, files, _, _ = socket.recv_fds(line, 1 << 20, 3)
    while not text.endswith(b"\n"):
        text += line.recv(1 << 20)
    job = json.loads(text)
    variables, store = [{}], None  # of each process
    if size := job.get("world_size"):
        port, store = _store()
        same = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), **_MEETING, "MASTER_PORT": str(port)}
        variables = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **same} for rank in range(size)]
    ranks = {}
    for rank, own in enumerate(variables):
        pid = os.fork()
        if pid == 0:
            line.close()
            _process(job, own, files, own_hub)
        ranks[pid] = rank
    if not store:
        with contextlib.suppress(OSError):
            line.sendall(f"{pid}\n".encode())
    codes, until = [0] * len(ranks), None
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            ended = os.waitstatus_to_exitcode(status)
            if pid in ranks:
                codes[ranks.pop(pid)] = ended
            if ended and not until:
                until = time.monotonic() + _GRACE
                _signal(ranks, signal.SIGTERM)
        elif (until and time.monotonic() > until) or _hung_up(line):
            _signal(ranks, signal.SIGKILL)
        else:
            time.sleep(0.01)
    if store:
        os.kill(store, signal.SIGKILL)
    with contextlib.suppress(OSError):
        line.sendall(json.dumps(codes).encode() + b"\n")
    os._exit(0)


def _signal(ranks: dict[int, int], number: int) -> None:
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            os.kill(pid, signal.SIGCONT)


def _hung_up(line: socket.socket) -> bool:
    try:
        return line.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def _store() -> tuple[int, int]:
    """Start the process that holds the ranks' store and outlives them. Return its port and process id."""
    agent = os.getpid()
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writable, f"{store.port:{_DIGITS}}".encode())
        while os.getppid() == agent:
            time.sleep(0.2)
        os._exit(0)
    os.close(writable)
    with open(readable) as said:
        return int(said.read(_DIGITS)), pid


def _process(job: dict[str, Any], variables: dict[str, str], files: list[int], own_hub: Callable[[], None]) -> NoReturn:
    os.environ.clear()
    os.environ.update({**job["environment"], **variables})
    if network := os.environ.get(NETWORK):
        enter_network(network)
    os.chdir(job["folder"])
    for number, file in enumerate(files):
        os.dup2(file, number)
    _open_files(unbuffered=job.get("unbuffered", False))
    own_hub()
    random.seed()
    sys.executable = job["executable"]
    sys.path[:] = job["path"]
    code: Any = 1
    try:
        what, *rest = job["arguments"]
        if what == "-m":
            sys.argv = rest
            if not hasattr(sys.modules.get(rest[0]), "__path__"):
                sys.modules.pop(rest[0], None)  # runpy warns of a module that is there already
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif what == "-c":
            sys.argv = ["-c", *rest[1:]]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)
        else:
            sys.argv = [what, *rest]
            runpy.run_path(what, run_name="__main__")
        code = 0
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else ended.code is not None
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def enter_network(path: str) -> None:
    """Move this process into a network namespace. Python itself can from 3.12 on."""
    with open(path) as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), path)


def _open_files(unbuffered: bool) -> None:
    """Open the standard files anew, as Python does when it starts: they may be a terminal."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        buffering = 1 if number == 2 or os.isatty(number) else -1
        errors = "backslashreplace" if number == 2 else None
        file = open(number, "w" if number else "r", buffering, errors=errors, closefd=False)  # noqa: SIM115
        if number and unbuffered:
            file.reconfigure(write_through=True)  # type: ignore[attr-defined]
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)


if __name__ == "__main__":
    _serve(sys.argv[1])

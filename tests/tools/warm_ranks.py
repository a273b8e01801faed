"""Jobs of several ranks without the start of Python, torch and transformers in each: processes forked from a warm one.

    warm_ranks.py SOCKET

The warm process imports what a rank needs and runs no operation, so it has no threads of torch that a fork would lose.
For each job it forks an agent, which forks a process for the ranks' store and one for each rank: the first failure ends
the rest. Differences from torchrun: ranks share one seed of `hash`, and the job has no run id.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MEETING = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
_DIGITS = 5  # digits of a port
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
            line.connect(_server())
            line.settimeout(timeout)
            job = {
                "world_size": world_size,
                "arguments": arguments,
                "environment": {**environment, "OMP_NUM_THREADS": "1"},
                "path": sys.path,
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
def _server() -> str:
    """Start the warm process, once for this process, with which it ends. Return its socket."""
    folder = tempfile.mkdtemp(prefix="reshard-warm-")
    place = f"{folder}/socket"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, __file__, place], env=environment, stdin=subprocess.PIPE)

    def end() -> None:
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()
        with contextlib.suppress(OSError):
            os.remove(place)
            os.rmdir(folder)

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
    import transformers
    import transformers.generation.utils
    import transformers.masking_utils
    import transformers.modeling_utils  # noqa: F401

    import runtime  # noqa: F401

    assert not torch.distributed.is_initialized()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # agents leave no zombies
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{place}.new")
        server.listen()
        os.rename(f"{place}.new", place)
        while True:
            ready, _, _ = select.select([server, sys.stdin], [], [])
            if sys.stdin in ready:  # the process that started this one has ended
                return
            line, _ = server.accept()
            with line:
                if os.fork() == 0:
                    server.close()
                    _agent(line)


def _agent(line: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text, files, _, _ = socket.recv_fds(line, 1 << 20, 3)
    while not text.endswith(b"\n"):
        text += line.recv(1 << 20)
    job = json.loads(text)
    port, store = _store()
    ranks = {}
    for rank in range(job["world_size"]):
        pid = os.fork()
        if pid == 0:
            line.close()
            _rank(job, rank, port, files)
        ranks[pid] = rank
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
    with contextlib.suppress(BlockingIOError):
        return line.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b""
    return False


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


def _rank(job: dict[str, Any], rank: int, port: int, files: list[int]) -> None:
    size = str(job["world_size"])
    places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.clear()
    os.environ.update(job["environment"], **places, **_MEETING, MASTER_PORT=str(port))
    os.chdir(job["folder"])
    for number, file in enumerate(files):
        os.dup2(file, number)
    code = 1
    try:
        what, *rest = job["arguments"]
        if what == "-m":
            sys.argv = rest
            sys.path[:] = [job["folder"], *job["path"]]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [what, *rest]
            sys.path[:] = [str(Path(what).parent), *job["path"]]
            runpy.run_path(what, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else ended.code is not None
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])

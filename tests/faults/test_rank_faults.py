"""A rank that is killed, raises, sleeps or is stopped, in any phase of a load: one line names it, and all ranks end."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pico
import pytest
import warm_commands
from places import WORKERS

import reshard

FAULTS = WORKERS / "faults.py"
TIMEOUT = 4.0  # seconds, after imports
TRACE_OF_TORCH = ("frame #", "Exception raised", "<omitting python frames>")
PROMPTLY = 2.0  # the limit from then until all processes are gone
AT_ONCE = 5.0

BEFORE_ANY_GROUP = ("handshake", "open", "import", "build", "read", "agree")
PHASES = (*BEFORE_ANY_GROUP, "mesh", "group", "wrap")
QUICK = [
    *("1 handshake stop", "1 handshake crash", "0 open sleep", "0 import stop", "1 build raise"),
    *("1 read kill", "0 read raise", "1 read crash", "0 agree sleep", "1 agree kill torchrun"),
    *("1 mesh sleep", "0 group stop", "1 group crash", "0 group kill", "1 wrap raise", "1 wrap stop"),
]
# Faults of fresh processes under the real launcher: the system goes on with a stopped rank when its launcher has ended,
# and the last one ends the process that started the rank. A forked rank has another parent. All faults come after the
# imports, so the other ones are the same in forked ranks.
FRESH = (" stop", " kill torchrun")
# The runtime catches and reports a rank's own errors; in the handshake and in `agree` only torch raises any.
IMPOSSIBLE = [f"{rank} {phase} raise" for rank in (0, 1) for phase in ("handshake", "agree")]
IMPOSSIBLE += [f"{rank} agree crash" for rank in (0, 1)]
ALL = [" ".join(words) for words in itertools.product("01", PHASES, ("kill", "raise", "crash", "sleep", "stop"))]
SLOW = [fault for fault in ALL if fault not in (*QUICK, *IMPOSSIBLE)]


@dataclass(frozen=True)
class Ended:
    """The end of a job. `seconds` run from the beginning of the load until all ranks were gone."""

    code: int
    out: str
    err: str
    seconds: float


def running(pid: int) -> bool:
    """Whether a process has not ended, even if its parent has not taken note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def run(command: list[str], fault: str, log: Path) -> Ended:
    log.mkdir()
    environment = {**os.environ, "FAULT": fault, "FAULT_LOG": str(log), "OMP_NUM_THREADS": "1"}
    arguments = ["--strategies", str(FAULTS), "--timeout", str(TIMEOUT)]
    python = sys.executable if fault.endswith(FRESH) else warm_commands.python()
    pids: dict[str, int] = {}
    started = time.time()
    with open(log.with_suffix(".out"), "w+") as out, open(log.with_suffix(".err"), "w+") as err:
        process = subprocess.Popen([python, *command, *arguments], env=environment, stdout=out, stderr=err)
        while process.poll() is None or any(map(running, pids.values())):
            ranks = [path for path in log.iterdir() if not path.suffix]  # ".part" is renamed at any moment
            pids |= {path.name: int(path.read_text()) for path in ranks}
            began = max((path.stat().st_mtime for path in ranks), default=started)
            assert time.time() - began < 60, (fault, pids)
            if pids and not any(map(running, pids.values())):
                break
            time.sleep(0.02)
        seconds = time.time() - began
        code = process.wait(30)
        out.seek(0)
        err.seek(0)
        return Ended(code, out.read(), err.read(), seconds)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("faults")
    source = pico.save("llama", root / "source")
    for world_size in (2, 4):
        reshard.convert(source, root / f"tp{world_size}", tp_size=world_size)
    return {2: root / "tp2", 4: root / "tp4"}


@pytest.fixture(scope="module")
def ended(
    request: pytest.FixtureRequest, folders: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Ended]]:
    """`ended(fault)` of `reshard run`. The runs of all coming tests go two at a time: each mostly waits."""
    root = tmp_path_factory.mktemp("logs")
    calls = [getattr(item, "callspec", None) for item in request.session.items if item.module is request.module]
    faults = [call.params["fault"] for call in calls if call and "fault" in call.params]

    def one(fault: str) -> Ended:
        return run(
            ["-m", "reshard", "run", str(folders[2]), "--prompt", "hello"], fault, root / fault.replace(" ", "-")
        )

    with ThreadPoolExecutor(2) as pool:
        running = {fault: pool.submit(one, fault) for fault in faults}
        yield lambda fault: running[fault].result()


def expected(rank: str, phase: str, kind: str) -> tuple[int, str | tuple[str, ...], str]:
    """Return the exit code, the line or those that may be, and the hint."""
    if kind == "raise":
        return 4, f"rank {rank}: injected", "mend it"
    if kind == "kill":
        return 9, f"rank {rank} was ended by SIGKILL", "memory"
    if kind == "kill torchrun":
        lost = "loading: rank 0 has lost the others, since their store is gone: "
        return -9, (lost, "rank 0 cannot reach the others: "), "torchrun"  # the second if it had not yet met them
    if kind == "crash":
        unexpected = f"rank {rank}: unexpected RuntimeError: injected"
        torchs = {
            "handshake": f"rank {rank} cannot reach the others: injected",
            "group": f"rank {rank}: cannot join the others: injected",
        }
        return (9, torchs[phase], "") if phase in torchs else (1, unexpected, "")
    what = "loading" if phase in BEFORE_ANY_GROUP else "connecting"
    return 9, f"{what}: no answer from rank {rank} in time", "--timeout"


def assert_named(fault: str, found: Ended) -> None:
    rank, phase, kind = fault.split(maxsplit=2)
    code, line, hint = expected(rank, phase, kind)
    # A rank stopped while the group was made briefly finds the others gone, and gloo logs that.
    said = re.sub(r"\[\S*gloo.*", "", found.err).splitlines()
    said = [text for text in said if text and "gloo" not in text.lower()]
    if kind == "kill torchrun":  # torch may log that it cannot reach the store, which has gone
        said = [text for text in said if "[c10d]" not in text and not text.startswith(TRACE_OF_TORCH)]
    assert [text.split(": ")[0] for text in said] == ["Error", "Hint"][: 1 + bool(hint)], found
    assert said[0].removeprefix("Error: ").startswith(line), found
    assert hint in said[-1], found
    assert (found.code, found.out) == (code, ""), found
    if kind in ("stop", "sleep"):
        assert TIMEOUT <= found.seconds < TIMEOUT + PROMPTLY, found
    else:
        assert found.seconds < TIMEOUT, found


@pytest.mark.fault(25)
@pytest.mark.parametrize("fault", [*QUICK, *(pytest.param(fault, marks=pytest.mark.slow) for fault in SLOW)])
def test_the_rank_is_named_and_all_end(fault: str, ended: Callable[[str], Ended]) -> None:
    assert_named(fault, ended(fault))


def torchrun(folder: Path, world_size: int, fault: str, log: Path) -> Ended:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    return run([*command, "-m", "runtime", "check", str(folder), "--reference", "no such"], fault, log)


@pytest.mark.fault(25)
def test_one_of_four_ranks_is_stopped_under_torchrun(folders: dict[int, Path], tmp_path: Path) -> None:
    found = torchrun(folders[4], 4, "0 read stop", tmp_path / "log")
    assert [line for line in found.err.splitlines() if line.startswith("Error: ")] == [
        "Error: loading: no answer from rank 0 in time"
    ]
    assert found.err.count("Traceback") == 1  # torchrun's own code
    assert set(re.findall(r"exitcode +: (-?\d+)", found.err)) <= {"9", "-15"}
    assert TIMEOUT <= found.seconds < TIMEOUT + PROMPTLY


@pytest.mark.fault(25)
def test_torchrun_names_a_rank_that_was_killed(folders: dict[int, Path], tmp_path: Path) -> None:
    found = torchrun(folders[2], 2, "1 read kill", tmp_path / "log")
    cause = found.err.partition("Root Cause")[2]
    assert re.findall(r"rank +: (\d)", cause) == ["1"]
    assert "Signal 9 (SIGKILL) received" in cause
    assert "Error: " not in found.err.replace("ChildFailedError: ", "")
    assert found.err.count("Traceback") == 1
    assert found.seconds < PROMPTLY


@pytest.mark.fault(24)
@pytest.mark.parametrize("world_size", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_wrong_number_of_ranks_ends_all_before_data_is_read(
    world_size: int, folders: dict[int, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders[2], tmp_path / "out", ignore=shutil.ignore_patterns("shard-*"))
    found = torchrun(folder, world_size, "no - fault", tmp_path / "log")
    assert [line for line in found.err.splitlines() if line.startswith(("Error: ", "Hint: "))] == [
        f"Error: {folder} was made for 2 ranks, not for {world_size}",
        f"Hint: use torchrun --nproc-per-node 2, or convert with --tp-size {world_size}",
    ]
    assert re.findall(r"exitcode +: (-?\d+)", found.err) == ["9"] * world_size
    assert found.seconds < AT_ONCE

"""Real disks that are full or fail: a small file system in memory, a limit on file sizes, calls spoilt by strace."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Cli, Result, assert_one_error, convert, tree

from reshard.errors import BadInputError
from reshard.operations.convert import work as conversion
from reshard.storage.disk import check_free_space

ROOM = 4 << 20  # bytes of the small file system
PAGE = 4096


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A folder with little room."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)]
    if shutil.which("mount") is None:
        pytest.skip("needs mount")
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, free: int) -> Path:
    """Leave this many bytes free."""
    filler = folder / "filler"
    with open(filler, "ab") as file:
        os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(folder).free - free, 1))
    return filler


def numbers(text: str) -> list[int]:
    return [int(found.replace(",", "")) for found in re.findall(r"\b\d[\d,]*\b", text)]


@pytest.mark.fault(4)
def test_too_little_room_from_the_start(checkpoint: Any, small: Path, cli: Cli, resharded: Path) -> None:
    filler = fill(small, 50 * PAGE)
    result = cli(*convert(checkpoint("llama"), small / "out"))
    assert_one_error(result, 5, "needs", "free")
    needed, free = numbers(result.err.split("needs")[1])
    assert free == shutil.disk_usage(small).free == 50 * PAGE
    assert needed > sum(path.stat().st_size for path in resharded.iterdir())
    assert os.listdir(small) == ["filler"]
    filler.unlink()
    assert cli(*convert(checkpoint("llama"), small / "out")).code == 0
    assert tree(small / "out") == tree(resharded)


@pytest.mark.fault(5)
def test_another_file_takes_the_room(
    checkpoint: Any, small: Path, cli: Cli, resharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room shrinks after the check, by a page each time: rank files, the journal or a small file does not fit."""
    out, hints, pages = small / "out", [], 0
    source = checkpoint("llama")
    rank_files = sum(-(-path.stat().st_size // PAGE) for path in resharded.glob("shard-*"))
    for pages in (0, rank_files // 2, *range(rank_files, 2 * rank_files)):

        def check(folder: Path, needed: int, *others: Path, free: int = pages * PAGE) -> None:
            check_free_space(folder, needed, *others)
            fill(small, free)

        with monkeypatch.context() as patch:
            patch.setattr(conversion, "check_free_space", check)
            result = cli(*convert(source, out, "--workers", 1))
        if result.code == 0:
            break
        assert_one_error(result, 5, "No space left")
        left = sorted(name.partition("-")[0] for name in os.listdir(small))
        assert left == ["filler", *["out.part"] * ("goes on" in result.hint)]
        hints.append(result.hint)
        (small / "filler").unlink()
        assert cli(*convert(source, out)).code == 0
        assert tree(out) == tree(resharded)
        shutil.rmtree(out)
    assert tree(out) == tree(resharded)
    assert hints[:2] == ["", ""]  # nothing was written yet
    assert sum("goes on" in hint for hint in hints) > 2
    assert rank_files + 2 < pages < 2 * rank_files


def command(source: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "reshard", *map(str, convert(source, out, "--workers", 1))]


@pytest.mark.fault(7)
def test_files_may_not_be_so_large(checkpoint: Any, tmp_path: Path, resharded: Path) -> None:
    """The signal that comes with this error would end the process."""
    source, out = checkpoint("llama"), tmp_path / "out"
    limited = f"ulimit -f 20; exec {shlex.join(command(source, out))}"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=120)
    assert_one_error(Result(done.returncode, done.stdout, done.stderr), 5, "shard-00001", "File too large")
    assert os.listdir(tmp_path) == []


def test_what_went_wrong_cannot_be_said() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "reshard", "inspect", "/nowhere/at/all"], stderr=full, timeout=60)
    assert done.returncode == BadInputError.exit_code


@pytest.mark.fault(5, 6, 7)
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize(
    ("spoilt", "code", "says"),
    [
        ("pwrite64:error=ENOSPC:when=9", 5, "No space left"),
        ("fsync:error=EIO:when=2", 5, "Input/output error"),
        pytest.param("fallocate:error=EDQUOT:when=2", 5, "quota exceeded", marks=pytest.mark.slow),
        pytest.param("fsync:error=ENOSPC:when=1", 5, "No space left", marks=pytest.mark.slow),
        pytest.param("renameat2:error=EIO:when=1", 5, "Input/output error", marks=pytest.mark.slow),
        pytest.param("pwrite64:error=EINTR:when=2+3", 0, "", marks=pytest.mark.slow),
        pytest.param("fsync:error=EINTR:when=1+2", 0, "", marks=pytest.mark.slow),
        pytest.param("renameat2:error=EINTR:when=1", 0, "", marks=pytest.mark.slow),
    ],
)
def test_the_system_says_so(
    spoilt: str, code: int, says: str, checkpoint: Any, tmp_path: Path, resharded: Path, cli: Cli
) -> None:
    source, out = checkpoint("llama"), tmp_path / "root" / "out"
    out.parent.mkdir()
    call = spoilt.partition(":")[0]
    trace = ["strace", "-f", "--seccomp-bpf", "-qq", "-o", str(tmp_path / "trace")]
    trace += ["-e", f"trace={call}", "-e", f"inject={spoilt}"]
    probe = subprocess.run([*trace, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"strace: {probe.stderr.strip()}")
    done = subprocess.run([*trace, *command(source, out)], capture_output=True, text=True, timeout=300)
    assert "INJECTED" in (tmp_path / "trace").read_text()
    if code:
        assert_one_error(Result(done.returncode, done.stdout, done.stderr), code, says)
        assert [name.partition("-")[0] for name in os.listdir(out.parent)] == ["out.part"] * ("goes on" in done.stderr)
        assert ("goes on" in done.stderr) == (call == "pwrite64")
        assert cli(*convert(source, out)).code == 0
    else:
        assert done.returncode == 0, done.stderr
    assert tree(out) == tree(resharded)
    assert os.listdir(out.parent) == ["out"]

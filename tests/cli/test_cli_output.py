"""`reshard convert` and its destination: existing files, locks, disks, signals, and changes meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_tools import (
    RANK_FILES,
    Cli,
    Refused,
    assert_one_error,
    convert,
    first_file,
    tree,
)

import reshard.cli.main
import reshard.execution.executor
import reshard.operations.convert.work


@pytest.mark.parametrize("kind", ["resharded", "folder", "file", "dangling link"])
def test_out_exists(kind: str, source: Path, out: Path, resharded: Path, refused: Refused) -> None:
    if kind == "resharded":
        shutil.copytree(resharded, out)
    elif kind == "folder":
        out.mkdir()
        (out / "precious.txt").write_text("mine")
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to("nowhere")
    result = refused(7, convert(source, out), "out: already exists", hint="choose another name")
    assert ("--overwrite" in result.hint) == (kind == "resharded")
    if kind != "resharded":
        refused(7, convert(source, out, "--overwrite"), "not a resharded folder")


def test_merge_names_no_option_that_it_lacks(resharded: Path, folder: Path, refused: Refused) -> None:
    result = refused(7, ["merge", resharded, folder], "out: already exists", hint="choose another name")
    assert "overwrite" not in result.hint


def test_link_to_a_resharded_folder_is_not_overwritten(
    source: Path, out: Path, tmp_path: Path, resharded: Path, refused: Refused
) -> None:
    out.symlink_to(shutil.copytree(resharded, tmp_path / "kept"))
    refused(7, convert(source, out, "--overwrite"), "out")


def test_overwrite(source: Path, folder: Path, tmp_path: Path, cli: Cli, resharded: Path) -> None:
    (folder / "stale.txt").write_text("old")
    result = cli("convert", source, folder, "--tp-size", 4, "--overwrite")
    assert (result.code, result.err) == (0, "")
    assert len(list(folder.glob("shard-*"))) == 4
    assert not (folder / "stale.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    assert cli("verify", folder).code == 0


def test_failed_overwrite_keeps_the_earlier_folder(source: Path, folder: Path, refused: Refused) -> None:
    os.truncate(first_file(source), 5000)
    refused(3, convert(source, folder, "--overwrite"), first_file(source).name)


def test_folders_above_out_are_made(resharded: Path, source: Path, tmp_path: Path, cli: Cli) -> None:
    out, merged = tmp_path / "a" / "b" / "out", tmp_path / "c" / "merged"
    assert cli(*convert(source, out)).code == 0
    assert cli("verify", out).code == 0
    assert cli("merge", resharded, merged).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "source"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_folders_above_out_go_again_after_a_failure(source: Path, tmp_path: Path, refused: Refused) -> None:
    """Only the folders made for OUT are removed: `refused` compares all files."""
    (tmp_path / "a").mkdir()
    os.truncate(first_file(source), 5000)
    refused(3, convert(source, tmp_path / "a" / "b" / "c" / "out"), first_file(source).name)


@pytest.mark.parametrize("above", ["file", "file/below", "dangling/below"])
def test_what_is_above_out_is_no_folder(above: str, source: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    refused(5, convert(source, tmp_path / above / "out"), above)


@pytest.mark.fault(22)
def test_lock_is_busy(source: Path, out: Path, refused: Refused) -> None:
    with open(f"{out}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(6, convert(source, out), "out.lock")


def test_leftovers_of_other_work_are_cleared(source: Path, out: Path, tmp_path: Path, cli: Cli) -> None:
    Path(f"{out}.lock").touch()
    part = Path(f"{out}.part-0123456789abcdef-01234567")
    part.mkdir()
    (part / RANK_FILES[0]).write_bytes(b"half")
    assert cli(*convert(source, out)).code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    assert cli("verify", out).code == 0


# --- disks ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB: the first rank file fits, the second does not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk takes root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "reshard-test", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mount: {mounted.stderr.decode().strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.fault(4)
def test_disk_too_small_is_said_before_writing(
    source: Path, small_disk: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reshard.operations.convert.work, "write_files", None)  # any write would fail
    result = refused(5, convert(source, small_disk / "out"), "needs 1,1", "only 65,536 are free")
    assert "out" in result.error


@pytest.mark.fault(5)
def test_disk_full_while_writing(
    source: Path, small_disk: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reshard.operations.convert.work, "check_free_space", lambda *_: None)
    refused(5, convert(source, small_disk / "out"), RANK_FILES[1], "No space left")


def test_disk_full_leaves_no_file_open(
    source: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    before = os.listdir("/proc/self/fd")
    refused(5, convert(source, out), RANK_FILES[0], "No space left")
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.fault(6)
def test_write_error(source: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pwrite", fail)
    refused(5, convert(source, out), "Input/output error")


# --- interruptions ---


def on_progress(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Call `action` once, from the thread that has just written the first block."""
    left = [action]

    def update(_: int) -> None:
        if left:
            left.pop()()

    @contextlib.contextmanager
    def progress(*_: object) -> Iterator[Callable[[int], object]]:
        yield update

    monkeypatch.setattr("reshard.cli.convert.progress_bar", progress)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_after_a_signal_the_next_run_goes_on(
    number: int,
    code: int,
    overwrite: bool,
    source: Path,
    out: Path,
    tmp_path: Path,
    resharded: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []

    def interrupt() -> None:
        seen.append(bool(list(out.parent.glob("out.part-*"))))
        os.kill(os.getpid(), number)
        time.sleep(0.3)  # meanwhile the main thread takes the signal

    if overwrite:
        shutil.copytree(resharded, out)
    on_progress(monkeypatch, interrupt)
    before = tree(tmp_path)
    result = cli(*convert(source, out, "--workers", 2, *(["--overwrite"] if overwrite else [])))
    assert seen == [True]
    assert result.code == code
    assert "Traceback" not in result.err
    assert result.out == ""
    assert result.error == "Error: interrupted"
    there = {name: held for name, held in tree(tmp_path).items() if not name.startswith("out.part-")}
    assert there == before
    assert cli(*convert(source, out, *(["--overwrite"] if overwrite else []))).code == 0
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]
    assert tree(out) == tree(resharded)


@pytest.mark.fault(15)
def test_source_changes_meanwhile(source: Path, out: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    on_progress(monkeypatch, lambda: os.utime(first_file(source), ns=(1, 1)))
    result = cli(*convert(source, out))
    assert_one_error(result, 4, first_file(source).name, "changed")
    assert os.listdir(out.parent) == ["source"]


@pytest.mark.fault(15)
def test_source_vanishes_meanwhile(source: Path, out: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    last = source / "model-00003-of-00003.safetensors"
    on_progress(monkeypatch, last.unlink)
    result = cli(*convert(source, out, "--workers", 1))
    assert result.code in (3, 4)
    assert_one_error(result, result.code, last.name)
    assert not out.exists()


@pytest.mark.fault(22)
def test_out_appears_meanwhile(source: Path, out: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    on_progress(monkeypatch, out.mkdir)
    assert_one_error(cli(*convert(source, out)), 7, "out")
    assert sorted(os.listdir(out.parent)) == ["out", "source"]
    assert os.listdir(out) == []

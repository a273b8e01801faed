"""The executor if the source changes, a worker fails or the disk is full."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cutting import same
from executor_tools import load, simple_job

from reshard.errors import IntegrityError, StorageError
from reshard.execution import executor
from reshard.execution.executor import Inputs, write_files
from reshard.resharded.layout import file_layout


def once(action: Callable[[], object]) -> Callable[[int], None]:
    """A `progress` that does something once the first block is written."""
    lock = threading.Lock()
    done: list[bool] = []

    def progress(_: int) -> None:
        with lock:
            if not done:
                done.append(True)
                action()

    return progress


def append_byte(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


def rewrite(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def swap(path: Path) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(path.read_bytes()[::-1])
    os.replace(new, path)


@pytest.mark.fault(15)
@pytest.mark.parametrize("change", [append_byte, rewrite, swap, os.unlink])
def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path, change: Callable[[Path], object]) -> None:
    source, tensors = simple_job(tmp_path)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        write_files(
            tmp_path,
            [file_layout("out.safetensors", tensors)],
            Inputs(source),
            workers=1,
            progress=once(lambda: change(source.files[0].path)),
        )


@pytest.mark.fault(15)
@pytest.mark.parametrize("change", [append_byte, rewrite, swap])
def test_a_source_that_changed_before_is_noticed(tmp_path: Path, change: Callable[[Path], object]) -> None:
    source, tensors = simple_job(tmp_path)
    change(source.files[0].path)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        write_files(tmp_path, [file_layout("out.safetensors", tensors)], Inputs(source))


@pytest.mark.fault(15)
def test_a_source_file_that_vanishes_after_it_was_digested_is_named(tmp_path: Path) -> None:
    source, tensors = simple_job(tmp_path, files=2, count=1)
    first = source.files[0]
    told: list[int] = []

    def progress(size: int) -> None:
        told.append(size)
        if len(told) == 2:  # one worker has written and digested the first file by then
            first.path.unlink()

    with pytest.raises(IntegrityError, match=first.name):
        write_files(
            tmp_path,
            [file_layout("out.safetensors", tensors)],
            Inputs(source),
            workers=1,
            progress=progress,
        )


@pytest.mark.parametrize("workers", [1, 4])
def test_the_first_failure_stops_the_rest(tmp_path: Path, workers: int) -> None:
    source, tensors = simple_job(tmp_path, count=200)
    calls: list[int] = []
    failed: list[bool] = []

    def fail_once(size: int) -> None:
        calls.append(size)
        last = threading.current_thread().name.endswith(f"_{workers - 1}")  # not the worker that is waited for first
        if last and not failed:
            failed.append(True)
            raise RuntimeError("no more")
        time.sleep(0.01)

    with pytest.raises(RuntimeError, match="no more"):
        write_files(
            tmp_path, [file_layout("out.safetensors", tensors)], Inputs(source), workers=workers, progress=fail_once
        )
    assert len(calls) < 20  # each other worker finishes its current tensor


@pytest.mark.fault(5)
def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, tensors = simple_job(tmp_path)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(executor, "pwrite", full)
    with pytest.raises(StorageError, match="No space left"):
        write_files(tmp_path, [file_layout("out.safetensors", tensors)], Inputs(source))


def test_a_failure_leaks_no_file_descriptor(tmp_path: Path) -> None:
    source, tensors = simple_job(tmp_path)
    layouts = [file_layout(f"{i}.safetensors", tensors) for i in range(3)]
    (tmp_path / "2.safetensors").touch()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StorageError, match="File exists"):
        write_files(tmp_path, layouts, Inputs(source))
    assert len(os.listdir("/proc/self/fd")) == before
    assert (tmp_path / "2.safetensors").read_bytes() == b""


def test_a_disk_too_small_leaks_no_file_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, tensors = simple_job(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StorageError, match="No space left"):
        write_files(tmp_path, [file_layout("out.safetensors", tensors)], Inputs(source))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.fault(7)
def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, tensors = simple_job(tmp_path)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:7], offset))
    write_files(tmp_path, [file_layout("out.safetensors", tensors)], Inputs(source))
    monkeypatch.undo()
    expected = load(source.files[0].path)
    found = load(tmp_path / "out.safetensors")
    assert all(same(found[name], tensor) for name, tensor in expected.items())


def test_a_thread_that_the_pool_does_not_know_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C can come between a thread's start and the pool's note of it. Its files stay open until it ends."""
    source, tensors = simple_job(tmp_path)
    seen: list[str] = []
    begun = threading.Event()

    def progress(_: int) -> None:
        begun.set()
        time.sleep(0.3)
        seen.append("written")

    def submit(_: Any, work: Callable[[], object]) -> None:
        threading.Thread(target=work).start()
        assert begun.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    with pytest.raises(KeyboardInterrupt):
        write_files(
            tmp_path,
            [file_layout("out.safetensors", tensors)],
            Inputs(source),
            progress=progress,
        )
    assert seen == ["written"]

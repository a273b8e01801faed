"""scripts/gpu_check without a GPU and without installing: what is missing, its budget, and what did not fit."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import device_check
import packaging
import pytest

GPU_CHECK = Path(device_check.__file__).parent / "gpu_check"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`check(parts, *arguments)`: run `main` in this process, on other parts than its own."""

    import torch  # takes seconds the first time

    assert torch

    def run(parts: dict[str, Callable[[], None]], *arguments: str) -> int:
        listed = [(name, 9 if name == "many" else 0, work) for name, work in parts.items()]
        monkeypatch.setattr(device_check, "parts", lambda device: iter(listed))
        monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        for name in ("PYTHONPATH", "HF_HUB_OFFLINE", "PYTHONDONTWRITEBYTECODE"):  # monkeypatch restores them afterwards
            monkeypatch.setenv(name, "")
        return device_check.main()

    return run


def test_a_bare_environment(tmp_path: Path) -> None:
    """One line names what is missing; nothing is installed into it, nor elsewhere."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = tmp_path / "bare" / "bin" / "python"
    before = sorted(tmp_path.rglob("*"))
    for where, words in {"": "lacks: packaging.", str(Path(packaging.__file__).parents[1]): ""}.items():
        there = {"PATH": os.environ["PATH"], "PYTHONPATH": where, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([GPU_CHECK, "--python", python], env=there, capture_output=True, text=True, check=False)
        if words:
            assert (done.returncode, done.stderr) == (2, "")
            assert done.stdout.count("\n") == 1
            assert words in done.stdout
        else:  # modules on PYTHONPATH count
            assert "lacks" not in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_what_an_environment_lacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert device_check.lacking() == []
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "xxhash":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.9.1" if name == "torch" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert device_check.main() == 2
    out = capsys.readouterr().out
    assert "lacks: torch>=2.10 (there is 2.9.1), xxhash>=3.5." in out
    assert "PYTHONPATH" in out


def test_what_does_not_fit_is_named(
    check: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device_check, "_LEAST", 0.5)
    code = (
        "import os, subprocess, sys, time; print('a figure', flush=True);"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    parts = {
        "quick": lambda: device_check.run([sys.executable, "-c", "print('quick figure')"]),
        "many": lambda: pytest.fail("this machine has no 9 GPUs"),
        "long": lambda: device_check.run([sys.executable, "-c", code]),
        "last": lambda: pytest.fail("there was no time for it"),
    }
    start = time.monotonic()
    assert check(parts, "--budget", "6") == 0
    assert time.monotonic() - start < 30
    out = capfd.readouterr().out
    assert "quick figure\n  passed in" in out
    assert "many: skipped, it needs 9 GPUs" in out
    assert "long:\na figure\n" in out
    assert "did not fit into 6 s: long (begun); last\nnothing failed\n" in out
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_part_that_fails_says_why_and_the_others_run(
    check: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    parts = {
        "bad": lambda: device_check.run([sys.executable, "-c", "raise SystemExit('this is why')"]),
        "worse": lambda: os.stat("/nowhere/at/all"),
        "good": lambda: None,
    }
    assert check(parts) == 1  # type: ignore[arg-type]
    out = capfd.readouterr().out
    assert "    this is why\n  FAILED after" in out
    assert "FileNotFoundError" in out
    assert "good:\n  passed in" in out
    assert out.endswith("failed: bad; worse\n")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_most_telling_part_comes_first(device: str) -> None:
    names = [name for name, _, _ in device_check.parts(device)]
    assert names[0] == {"cpu": "cpu, gloo", "cuda": "one GPU, one rank, nccl"}[device]
    assert "rate of a load" in names[:3]
    assert len(set(names)) == len(names) == {"cpu": 2, "cuda": 6}[device]

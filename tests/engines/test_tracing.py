"""The planner's process: what it is given, what it is kept from, and how it ends. A script stands for the Python."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path

import engine_tools
import pytest

from reshard.checkpoint.source import open_source
from reshard.engines import tracing
from reshard.engines.tracing import Asked, python_of_engine, traced
from reshard.errors import BadInputError, UsageError

NAME = "llama-tp2"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine_tools.checkpoint(NAME, tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[[str], Path]:
    """`stand_in(lines)` is a program in place of the engine's Python: it runs lines of shell. Its last argument is the
    planner's folder."""

    def make(lines: str) -> Path:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/bash\nfolder=${{!#}}\n{lines}\n")
        path.chmod(0o755)
        return path

    return make


def planned(source: Path, python: Path):
    checkpoint = open_source(source)
    return traced(Asked(2), checkpoint.tensors, source, ("config.json", *checkpoint.extras), python=python)


def test_it_gets_names_and_small_files_and_no_secrets(
    source: Path, stand_in: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PYTHONPATH", "VLLM_PLUGINS"):
        monkeypatch.setenv(name, "canary")
    plan = tmp_path / "plan"
    plan.write_bytes(gzip.decompress(engine_tools.plan_of(NAME).read_bytes()))
    kept = tmp_path / "kept"
    found = planned(
        source,
        stand_in(
            f'mkdir {kept}; env > {kept}/env; pwd > {kept}/cwd; echo "$@" > {kept}/arguments\n'
            f'cp -r "$folder" {kept}/folder; cp {plan} "$folder/plan.jsonl"'
        ),
    )
    assert found.engine["tp"] == 2
    environment = (kept / "env").read_text()
    assert "canary" not in environment
    assert {"HF_HUB_OFFLINE=1", "VLLM_NO_USAGE_STATS=1", "VLLM_PLUGINS="} <= set(environment.splitlines())
    folder = (kept / "cwd").read_text().strip()
    assert (kept / "arguments").read_text().split() == ["-P", "-s", str(tracing._PLANNER), folder]
    assert not Path(folder).exists()
    assert sorted(path.name for path in (kept / "folder").iterdir()) == ["model", "request.json", "said"]
    assert sorted(path.name for path in (kept / "folder" / "model").iterdir()) == [
        "config.json",
        "generation_config.json",
    ]
    asked = json.loads((kept / "folder" / "request.json").read_text())
    assert asked["tensors"]["model.norm.weight"] == ["float32", [128]]


@pytest.mark.parametrize(
    ("lines", "words"),
    {
        "its own error": ("echo 'torch.X: y'; echo 'pkg.mod.ValueError: tp must divide 8'; exit 1", "tp must divide 8"),
        "of a rank": ("echo '[rank0]: RuntimeError: no such kernel'; exit 1", "RuntimeError: no such kernel"),
        "of pydantic": (
            "echo 'p.ValidationError: 1 validation error for X'; echo '  Value error, no such dtype [type=v]'; exit 1",
            "ValidationError: no such dtype",
        ),
        "of pydantic, cut off": ("echo 'p.ValidationError: 1 error'; exit 1", "ValidationError: 1 error"),
        "no vLLM": ("echo \"ModuleNotFoundError: No module named 'vllm'\"; exit 1", "that Python has no vLLM"),
        "silence": ("exit 7", "ended with code 7"),
        "no plan": ("echo fine", "ended with code 0: fine"),
        "control characters": ("printf 'ValueError: a\\033[31mb\\n'; exit 1", r"a\\x1b\[31mb"),
    }.values(),
)
def test_its_last_words_are_told(lines: str, words: str, source: Path, stand_in: Callable[[str], Path]) -> None:
    with pytest.raises(BadInputError, match=words):
        planned(source, stand_in(lines))


def test_one_that_hangs_is_ended_with_all_it_started(
    source: Path, stand_in: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "_SECONDS", 1)
    child = tmp_path / "child"
    start = time.monotonic()
    with pytest.raises(BadInputError, match="made no plan within 1 s"):
        planned(source, stand_in(f"sleep 100 & echo $! > {child}; wait"))
    assert time.monotonic() - start < 20
    status = Path("/proc") / child.read_text().strip() / "status"
    assert not status.exists() or "State:\tZ" in status.read_text()  # ended, if perhaps not yet buried


def test_memory_is_limited(source: Path, stand_in: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_MEMORY", 1 << 30)
    with pytest.raises(BadInputError, match="MemoryError: none"):
        planned(source, stand_in("[ $(ulimit -d) -le 1048576 ] && echo 'MemoryError: none'; exit 1"))


def test_a_link_to_a_python_is_followed_by_the_system(tmp_path: Path) -> None:
    """A virtual environment's Python is a link: what it leads to has other packages."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to("/bin/sh")
    assert python_of_engine(tmp_path / "bin" / "python") == tmp_path / "bin" / "python"
    with pytest.raises(UsageError, match="no Python to run"):
        python_of_engine(tmp_path / "bin")

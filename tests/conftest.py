"""Fixtures: checkpoints shared by the whole run, the command line in this process, an environment of the tests' own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# At import: huggingface_hub and torch read their environment once, when they are first imported. The models here are so
# small that a second thread only waits, and waiting threads take the CPUs from other processes.
_HOME = tempfile.TemporaryDirectory(prefix="reshard-hf-")
_ENVIRONMENT = {"HF_HOME": _HOME.name, "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
_ENVIRONMENT["OMP_NUM_THREADS"] = "1"
os.environ.update(_ENVIRONMENT)

import warm_commands  # noqa: E402
from cli_tools import Checkpoint, Cli, Refused, Result, assert_one_error, time_limit, tree  # noqa: E402
from fake_hub import FakeHub  # noqa: E402

import reshard.cli.main  # noqa: E402

if TYPE_CHECKING:
    from object_store import ObjectStore

# The tests send Ctrl-C, which a background process of a script ignores.
signal.signal(signal.SIGINT, signal.default_int_handler)


# What `scripts/test --quick` runs: rooms whose tests stay in this process, less files that start others all the same.
_QUICK = (
    *("files", "sharding", "strategies", "showing", "checkpoint", "resharded", "planning", "execution", "operations"),
    "cli",
)
_NOT_QUICK = {
    *("test_plans", "test_golden", "test_untrusted_sources", "test_hostile_config", "test_memory", "test_descriptors"),
    *("test_publish", "test_published_together", "test_pull", "test_env", "test_card", "test_resharded"),
    *("test_speaking", "test_cli_output", "test_hints", "test_switches", "test_strategies", "test_page"),
}


# The files that take longest, longest first: begun late, one of them would keep a single worker busy at the end.
_LONG = (
    *("test_rank_faults", "test_decoding", "test_current_folder", "test_families", "test_readme", "test_generate"),
    *("test_parity", "test_check", "test_resume", "test_shrinking", "test_descriptors", "test_header_fuzz"),
    *("test_store_faults", "test_benchmarks", "test_memory", "test_hub", "test_disk_full", "test_strategies"),
    *("test_runtime", "test_untrusted_sources", "test_hostile_config", "test_env", "test_bench"),
)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # xdist would begin with the files that have most tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only tests that stay in this process: a few minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("quick"):
        config.hook.pytest_deselected(items=[item for item in items if not _is_quick(item.path)])
        items[:] = [item for item in items if _is_quick(item.path)]
    places = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def _is_quick(path: Path) -> bool:
    return path.stem == "test_house" or (path.parent.name in _QUICK and path.stem not in _NOT_QUICK)


_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    # A command that runs in this process may set it for good: it must not reach the next test's subprocesses.
    monkeypatch.setenv(_BARS, "")
    monkeypatch.delenv(_BARS)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """`checkpoint(family, **options)` returns the folder of `pico.save`, made once per run. Do not change it."""
    import pico

    made: dict[str, Path] = {}

    def make(family: str, **options: Any) -> Path:
        key = f"{family} {sorted(options.items())}"
        if key not in made:
            made[key] = pico.save(family, tmp_path_factory.mktemp(family), **options)
        return made[key]

    return make


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process, for 20 seconds at most; with `--quiet`, unless `aloud`."""

    def run(*arguments: object, seconds: float = 20, aloud: bool = False) -> Result:
        capfd.readouterr()
        before = signal.getsignal(signal.SIGTERM)
        code: Any = 0
        try:
            with time_limit(seconds):
                reshard.cli.main.main([*([] if aloud else ["--quiet"]), *map(str, arguments)])
        except SystemExit as finished:
            code = finished.code
        finally:
            signal.signal(signal.SIGTERM, before)
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Refused:
    """Run a command that must fail in one line, and leave everything under `tmp_path` as it was."""

    def run(code: int, arguments: list[object], *mentions: str, hint: str = "") -> Result:
        before = tree(tmp_path)
        result = cli(*arguments)
        assert_one_error(result, code, *mentions, hint=hint)
        assert tree(tmp_path) == before
        return result

    return run


@pytest.fixture(scope="module")
def room() -> Iterator[Path]:
    """A folder in memory, so that thousands of tries need not reach the disk."""
    from disk_calls import folder_in_memory

    with folder_in_memory() as folder:
        yield folder


@pytest.fixture
def source(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A copy of a llama checkpoint in three files, to be spoilt."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "source"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="session")
def resharded(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama checkpoint on two ranks. Read only."""
    folder = tmp_path_factory.mktemp("resharded") / "llama-tp2"
    reshard.convert(checkpoint("llama"), folder, tp_size=2)
    return folder


@pytest.fixture
def folder(resharded: Path, out: Path) -> Path:
    """A copy of the resharded folder, at `out`, to be spoilt."""
    return Path(shutil.copytree(resharded, out))


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """HF_HOME of the subprocesses of one test."""
    return tmp_path / "home"


@pytest.fixture
def python(hub: FakeHub, home: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python(*arguments, token=…, **variables)` runs Python against the Hub of this test, warm if it can be."""

    def run(*arguments: object, token: str = "hf_test", **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**hub.environment(home, token=token), "OMP_NUM_THREADS": "1", **variables}
        command = [warm_commands.python(), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    return run


@pytest.fixture
def here(hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The Hub of this test, used by this process: its client waits for a second at most and retries at once."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    values = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DOWNLOAD_TIMEOUT": 1,
        "HF_HUB_ETAG_TIMEOUT": 1,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    close_session()
    yield hub
    close_session()


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    import object_store

    with object_store.serve() as server:
        yield server


@pytest.fixture
def store(server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An empty bucket. This process and those it starts use its server as S3."""
    from s3fs import S3FileSystem

    for name, value in server.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(S3FileSystem, "read_timeout", 1)
    monkeypatch.setattr(S3FileSystem, "retries", 2)
    yield server
    server.fault = None
    server.log.clear()
    server.empty()


@pytest.fixture
def stored_source(store: ObjectStore, checkpoint: Checkpoint) -> str:
    """A llama in three files, in the store: its URL."""
    from object_store import contents

    return store.put("llama", contents(checkpoint("llama")))


@pytest.fixture
def stored(store: ObjectStore, resharded: Path) -> str:
    """The llama on two ranks, as a folder tp2 in the store: its URL."""
    from object_store import contents

    return store.put("model/tp2", contents(resharded))

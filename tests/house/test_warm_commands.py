"""The stand-in for Python that other tests start their commands with: what a command finds there is its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import warm_commands

# Print every constant that the libraries have of the Hub, and where a placeholder is left.
LOOK = """
import gc, json, sys
import transformers.utils.hub
import huggingface_hub.hf_api

mark = "-".join(["placeholder", "of", "the"])

def marked(value):
    if type(value) in (list, tuple, set, frozenset):
        return any(map(marked, value))
    return (type(value) is str and mark in value) or (type(value) is bytes and mark.encode() in value)

def left():
    gc.unfreeze()
    own = [vars(sys.modules[name]) for name in ("__main__", "warm_commands") if name in sys.modules]
    for one in gc.get_objects():
        if type(one) is dict and not any(one is names for names in own):
            yield from ([str(key), str(value)] for key, value in list(one.items()) if marked(value) or marked(key))
        elif type(one) in (list, tuple, set, frozenset) and marked(one):
            yield str(one)

plain = (str, int, float, bool, frozenset, type(None))
found = {
    f"{name}.{key}": sorted(map(str, value)) if isinstance(value, frozenset) else value
    for name, module in list(sys.modules.items()) if name.startswith(("huggingface_hub", "transformers.utils"))
    for key, value in list(vars(module).items()) if isinstance(value, plain) and key.isupper() and key != "SESSION_ID"
}
print(json.dumps({"warm": "reshard.cli.main" in sys.modules, "found": found, "left": list(left()), "path": sys.path}))
"""


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "script.py").write_text(text)
        return tmp_path / "script.py"

    return write


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.mark.parametrize(
    "variables",
    [{}, {"HF_ENDPOINT": "http://127.0.0.1:9/", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}],
)
def test_the_hub_is_the_commands_own(variables: dict[str, str], script: Callable[[str], Path], tmp_path: Path) -> None:
    """Constants are those of a fresh process; no string of the warm process's own Hub is left anywhere."""
    there = {**os.environ, "HF_HOME": str(tmp_path / "home"), **variables}
    fresh, warm = (run(python, script(LOOK), env=there) for python in (sys.executable, warm_commands.python()))
    assert (fresh.returncode, warm.returncode) == (0, 0), (fresh, warm)
    expected, found = json.loads(fresh.stdout), json.loads(warm.stdout)
    assert (expected["warm"], found["warm"], found["left"]) == (False, True, [])
    assert found["path"] == expected["path"]
    both = expected["found"].keys() & found["found"].keys()
    assert {name for name in both if found["found"][name] != expected["found"][name]} == set()
    assert found["found"]["huggingface_hub.constants.HF_HUB_CACHE"] == str(tmp_path / "home/hub")
    assert found["found"]["huggingface_hub.constants.HF_HUB_OFFLINE"] == ("HF_HUB_OFFLINE" in variables)


@pytest.mark.parametrize("variable", ["HF_DEBUG", "TRANSFORMERS_OFFLINE", "PYTHONOPTIMIZE"])
def test_python_itself_runs_what_the_warm_process_cannot(variable: str, script: Callable[[str], Path]) -> None:
    look = script("import sys; print(sys.executable, 'torch' in sys.modules)")
    assert run(warm_commands.python(), look).stdout == f"{warm_commands.python()} True\n"
    done = run(warm_commands.python(), look, env={**os.environ, variable: "1"})
    assert done.stdout == f"{sys.executable} False\n"
    assert run(warm_commands.python(), "-c", look.read_text()).stdout == f"{warm_commands.python()} True\n"
    assert run(warm_commands.python(), "-m", "timeit", "-n1", "-r1").returncode == 0


def test_a_command_has_its_own_words_files_and_folder(script: Callable[[str], Path], tmp_path: Path) -> None:
    look = script("import os, sys; print(sys.argv[1:], input(), os.getcwd()); sys.exit('no')")
    done = run(warm_commands.python(), "-u", look, "a b", input="typed\n", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, f"['a b'] typed {tmp_path}\n", "no\n")
    failed = run(warm_commands.python(), script("1 / 0"))
    assert (failed.returncode, failed.stderr.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_reach_it(number: signal.Signals, script: Callable[[str], Path]) -> None:
    """A command that handles a signal goes on; one that does not ends of it, as the process does that stands for it."""
    waits = script("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    with subprocess.Popen(
        [warm_commands.python(), waits], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        pid = int(process.stdout.readline())  # type: ignore[union-attr]
        assert warm_commands.own_id(process) == pid
        process.send_signal(number)
        assert process.wait(10) == (1 if number == signal.SIGINT else -number)  # KeyboardInterrupt ended it
    until = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < until
        time.sleep(0.01)

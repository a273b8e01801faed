"""No process that the tool starts runs anything from the current folder; and whose `runtime` a rank runs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from places import ROOT

import reshard
from reshard.launch import current_folder

BIN = Path(sys.executable).parent
# Modules that Python, the tool or one of its libraries would import, or run at its start.
NAMES = ["runtime", "reshard", "torch", "transformers", "tokenizers", "click", "xxhash", "numpy", "nothing_at_all"]
CUSTOM = ["sitecustomize", "usercustomize"]
RECORD = "import os\nwith open({path!r}, 'a') as file:\n    file.write({name!r} + f' {{os.getpid()}}\\n')\n"
# Run on every rank: a library's own `python -m` finds no module in the current folder either.
STYLES = """
import os, subprocess, sys
from reshard.strategies import ALL_PARALLEL_STYLES, ColwiseParallel

ALL_PARALLEL_STYLES.register_strategy("mine", ColwiseParallel())
for how in (["-m", "nothing_at_all"], ["-c", "import nothing_at_all"]):
    done = subprocess.run([sys.executable, *how], capture_output=True, text=True)
    assert "No module named nothing_at_all" in done.stderr.replace("'", ""), done
assert os.getcwd() not in sys.path
"""
LEAVE = "from reshard.launch.current_folder import leave; leave(); import sys; print('' in sys.path)"
TORCHRUN = [str(BIN / "torchrun"), "--no-python", "--standalone", "--nproc-per-node", "2"]


class Trap:
    """A folder full of modules that record that they were run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "trap"
        self.log = folder / "run"
        self.folder.mkdir()

    def set(self, names: Sequence[str]) -> None:
        for name in names:
            (self.folder / f"{name}.py").write_text(RECORD.format(path=str(self.log), name=name))

    def run(self, *command: object, **variables: str) -> tuple[subprocess.CompletedProcess[str], int]:
        """Run a command in the folder; return its result and its process id."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment |= {"OMP_NUM_THREADS": "1", "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]), **variables}
        with subprocess.Popen(
            list(map(str, command)),
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err), process.pid

    def ran(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    return Trap(tmp_path)


@pytest.fixture
def styles(tmp_path: Path) -> Path:
    (tmp_path / "styles.py").write_text(STYLES)
    return tmp_path / "styles.py"


def test_no_rank_runs_what_lies_there(trap: Trap, styles: Path, resharded: Path) -> None:
    """The launcher, its ranks and their processes do not run it. The missing tokenizer is the last thing found."""
    trap.set([*NAMES, *CUSTOM])
    done, _ = trap.run(BIN / "reshard", "run", resharded, "--prompt", "x", "--strategies", styles)
    assert "holds no tokenizer" in done.stderr
    assert (done.returncode, trap.ran()) == (3, [])


def test_nor_under_torchrun(trap: Trap, styles: Path, resharded: Path, checkpoint: Callable[..., Path]) -> None:
    trap.set([*NAMES, *CUSTOM])
    source = checkpoint("llama")
    done, _ = trap.run(*TORCHRUN, "reshard-rank", "check", resharded, "--reference", source, "--strategies", styles)
    assert done.returncode == 0, done.stderr
    assert "tokens equal" in done.stdout
    assert trap.ran() == []


@pytest.fixture(scope="module")
def whole(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for one rank: a launcher and a rank are as many kinds of processes as there are."""
    folder = tmp_path_factory.mktemp("whole") / "tp1"
    reshard.convert(checkpoint("llama"), folder, tp_size=1)
    return folder


@pytest.mark.parametrize("entry", ["", "."])
def test_an_entry_of_the_path_that_means_it(entry: str, trap: Trap, styles: Path, whole: Path) -> None:
    """Python's own start-up may run files there, in the process started that way and in no other."""
    trap.set([*CUSTOM, "runtime", "torch", "transformers", "numpy", "nothing_at_all"])
    path = os.pathsep.join([entry, "/somewhere/else"])
    command = ["run", whole, "--prompt", "x", "--strategies", styles]
    done, pid = trap.run(BIN / "reshard", *command, PYTHONPATH=path)
    assert "holds no tokenizer" in done.stderr
    assert done.returncode == 3
    assert set(trap.ran()) <= {f"{name} {pid}" for name in CUSTOM}


@pytest.mark.parametrize("start", [["-m", "reshard"], ["-c", "from reshard.cli.main import entry; entry()"]])
def test_python_that_was_told_to_look_there(start: list[str], trap: Trap, checkpoint: Callable[..., Path]) -> None:
    trap.set(["torch", "transformers", "numpy"])
    arguments = ["plan", checkpoint("llama"), "--tp-size", "2"]
    done, _ = trap.run(sys.executable, *start, *arguments)
    assert done.returncode == 0, done.stderr
    assert trap.ran() == []


def test_a_runtime_of_somebody_else_is_named(trap: Trap, resharded: Path) -> None:
    """Python is told to find it first. The launcher names it before it starts a rank; of several ranks, one does."""
    trap.set(["runtime"])
    stranger = f"Error: {trap.folder / 'runtime.py'}: Python takes it for `runtime`, which is a package of reshard"
    hint = "Hint: rename it, or take its folder out of PYTHONPATH"
    done, _ = trap.run(BIN / "reshard", "run", resharded, "--prompt", "x", PYTHONPATH=str(trap.folder))
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", [stranger, hint])
    command = ["reshard-rank", "generate", resharded, "--prompt", "x"]
    done, _ = trap.run(*TORCHRUN, *command, PYTHONPATH=str(trap.folder))
    said = [line for line in done.stderr.splitlines() if line.startswith(("Error: ", "Hint: "))]
    assert said == [stranger, hint]
    assert trap.ran() == []


@pytest.mark.parametrize(
    ("given", "first", "kept"),
    [
        (None, "/elsewhere", None),
        ("", "/elsewhere", None),
        (":", "/elsewhere", None),
        (":/a:.:b:/c:", "/elsewhere", "/a:/c"),
        ("/a", "{home}", "/a:{home}"),  # the folder of reshard, as it is not installed
        ("/a:{home}", "{home}", "/a:{home}"),
    ],
)
def test_what_children_get(given: str | None, first: str, kept: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    home = str(Path(reshard.__file__).parents[1])
    rest = [] if "{home}" in first else [home]
    monkeypatch.setattr(sys, "path", [first.format(home=home), *rest])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    if given is not None:
        monkeypatch.setenv("PYTHONPATH", given.format(home=home))
    current_folder.keep_children_out()
    assert os.environ.get("PYTHONPATH") == (kept and kept.format(home=home))
    assert os.environ["PYTHONSAFEPATH"] == "1"


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    gone = "import os; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone'); os.environ['PYTHONPATH'] = ':x'"
    done = subprocess.run(
        [sys.executable, "-c", f"{gone}; {LEAVE}"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def started(path: Path) -> Iterator[list[str]]:
    """Yield the words that a file passes after `sys.executable`, in a list, a call or a partial call."""
    for node in ast.walk(ast.parse(path.read_text())):
        words: list[ast.expr] = []
        if isinstance(node, ast.List):
            words = node.elts
        elif isinstance(node, ast.Call):
            words = [node.func, *node.args] if ", sys.executable)" in ast.unparse(node.func) else node.args
        if len(words) > 1 and "sys.executable" in ast.unparse(words[0]):
            yield list(map(ast.unparse, words[1:]))


def test_every_python_that_we_start_is_told() -> None:
    """`-P` comes first, here and in the scripts, unless Python runs a file, whose folder is meant to be found."""
    files = [path for folder in ("reshard", "runtime", "scripts") for path in (ROOT / folder).rglob("*.py")]
    starts = [(path.name, words) for path in files for words in started(path)]
    assert {"agent.py", "environment.py", "bench_common.py", "device_check.py"} <= {name for name, _ in starts}
    assert [(name, words) for name, words in starts if words[0] != "'-P'" and not words[0].endswith(".py'")] == []

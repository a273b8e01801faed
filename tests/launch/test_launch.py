"""`reshard run`, `check` and `bench` until a rank starts: options, checks beforehand, and the ranks' arguments."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import warm_commands
from cli_tools import RANK_FILES, Cli, flip
from click.shell_completion import ShellComplete

import reshard
import reshard.launch.agent
import reshard.launch.benchmark.runs
from reshard.cli.main import cli as offline
from reshard.launch.options import ENGINES, SDPA_BACKENDS, job_options
from runtime.__main__ import cli as online
from runtime.benchmark.engines import PEERS
from runtime.model.kernels import SDPA_KERNELS

PAIRS = {"run": "generate", "check": "check", "bench": "bench"}
Started = list[tuple[list[str], int]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """The words and the number of the ranks that would have been started. Every launch returns 4."""
    found: Started = []

    def launch(words: list[str], processes: int) -> int:
        found.append((words, processes))
        return 4

    monkeypatch.setattr(reshard.launch.agent, "launch", launch)
    monkeypatch.setattr(reshard.launch.benchmark.runs, "launch", launch)
    return found


@pytest.fixture
def files(tmp_path: Path, resharded: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `tp2` is a resharded folder; `damaged` lacks a rank file."""
    (tmp_path / "tp2").symlink_to(resharded)
    shutil.copytree(resharded, tmp_path / "damaged")
    (tmp_path / "damaged" / RANK_FILES[1]).unlink()
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"\xff")
    (tmp_path / "source").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", PAIRS)
def test_both_lines_have_the_same_options(name: str) -> None:
    job = {option.name for option in job_options(lambda: None).__click_params__}  # type: ignore[attr-defined]

    def of(command: click.Command) -> dict[str | None, dict[str, Any]]:
        return {option.name: option.to_info_dict() for option in command.params if option.name not in job}

    assert of(offline.commands[name]) == of(online.commands[PAIRS[name]])
    assert {"revision", "timeout", "style"} <= of(offline.commands[name]).keys()


@pytest.mark.parametrize("name", PAIRS)
def test_help_lists_every_option(name: str, cli: Cli) -> None:
    said = cli(name, "--help").out
    options = [option for option in offline.commands[name].params if isinstance(option, click.Option)]
    assert len(options) >= 15
    assert [option.name for option in options if option.opts[0] not in said] == []


def test_names_that_torch_and_engines_have_too() -> None:
    assert list(SDPA_KERNELS) == list(SDPA_BACKENDS)
    assert sorted(PEERS) == sorted(ENGINES)


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("run tp2", 2, "nothing to continue"),
        ("run tp2 --promt x", 2, "No such option"),
        ("run tp2 --prompt x --top-p 0.5", 2, "--top-p is for sampling"),
        ("run tp2 --prompt x --seed 0", 2, "--seed is for sampling"),
        ("run tp2 --prompt x --compile default --cache dynamic", 2, "needs a static cache"),
        ("run tp2 --prompt x --compile quick", 2, "reduce-overhead"),
        ("run tp2 --chat --dp 2", 2, "a chat is one replica's"),
        ("run tp2 --prompt x --stop=", 2, "empty text"),
        ("run tp2 --prompt x --sdpa fast", 2, "mem-efficient"),
        ("run tp2 --prompt x --sdpa math --attn eager", 2, "goes with attention sdpa"),
        ("run tp2 --prompt x --device gpu", 2, "is not cpu, cuda, or cuda:0"),
        ("run tp2 --prompt x --temperature nan", 2, "is not a finite number"),
        ("run tp2 --prompt x --strategies none.py", 2, "none.py"),
        ("run tp2 --prompt x --revision main", 2, "has no revisions"),
        ("run tp2 --prompts none.txt", 3, "No such file"),
        ("run tp2 --prompts source", 3, "Is a directory"),
        ("run tp2 --prompts empty.txt", 3, "holds no prompts"),
        ("run tp2 --prompts latin.txt", 3, "is not UTF-8"),
        ("run ./none --prompt x", 3, "none"),
        ("run source --prompt x", 3, "not a resharded"),
        ("run damaged --prompt x", 4, f"{RANK_FILES[1]}: is missing"),
        ("check tp2", 2, "holds no reference logits"),
        ("check tp2 --per-layer", 2, "layers are compared"),
        ("check tp2 --reference ./none", 3, "none"),
        ("check tp2 --reference source", 3, "source"),
        ("check damaged --reference source", 4, "is missing"),
        ("check tp2 --reference source --sdpa math --attn eager", 2, "goes with attention sdpa"),
        ("bench", 2, "OUT"),
        ("bench tp2 --batch 0,1", 2, "is not a list of batch sizes"),
        ("bench tp2 --against vllm", 2, "tensor_parallel"),
        ("bench tp2 --against transformers", 2, "--against runs the checkpoint"),
        ("bench tp2 --against transformers --source ./none", 3, "none"),
        ("bench tp2 --plot chart.txt", 2, "charts are drawn as"),
        ("bench tp2 ./none", 3, "none"),
        ("bench tp2 damaged", 4, "is missing"),
        ("bench tp2 --sdpa math --attn eager", 2, "goes with attention sdpa"),
    ],
)
def test_refused_before_a_rank_starts(
    line: str, code: int, words: str, files: Path, cli: Cli, started: Started
) -> None:
    result = cli(*line.split())
    assert (result.code, result.out, started) == (code, "", []), result
    assert "Traceback" not in result.err
    assert words in result.err


@pytest.mark.parametrize("line", ["run tp2 --promt x", "run tp2 --prompts none.txt", "check tp2", "bench tp2 ./none"])
def test_a_refusal_costs_no_torch(line: str, files: Path) -> None:
    code = f"""
import sys
from reshard.cli.main import main
try:
    main({line.split()})
except SystemExit as ended:
    print(ended.code, sorted({{"torch", "transformers", "numpy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout in ("2 []\n", "3 []\n"), done


@pytest.mark.parametrize(
    ("line", "words", "processes"),
    [
        ("run tp2 --prompt x", "generate tp2 --prompt x", 2),
        ("-v run tp2 --prompt x --dp 3", "--verbose generate tp2 --prompt x --dp 3", 6),
        ("run -q tp2 --prompt -v", "--quiet generate -q tp2 --prompt -v", 2),
        ("run --prompt=x -- tp2", "generate --prompt=x -- tp2", 2),
        ("check --reference src tp2 --dp 2 --format json", "check --reference src tp2 --dp 2 --format json", 4),
    ],
)
def test_ranks_get_the_words_and_their_exit_code_is_kept(
    line: str,
    words: str,
    processes: int,
    files: Path,
    checkpoint: Callable[..., Path],
    cli: Cli,
    started: Started,
) -> None:
    (files / "src").symlink_to(checkpoint("llama"))
    assert cli(*line.split(), aloud=True).code == 4
    assert started == [(words.split(), processes)]


def test_each_job_of_a_benchmark_gets_the_words(files: Path, cli: Cli, started: Started) -> None:
    assert cli("-q", "bench", "--batch", "1", "tp2", "--steps", "0").code == 4
    [(words, processes)] = started
    assert words[:6] == ["--quiet", "bench", "--engine", "reshard", "--on", "tp2"]
    assert words[8:] == ["--batch", "1", "tp2", "--steps", "0"]
    assert processes == 2


def test_what_can_be_read_once_is_left_to_rank_0(files: Path, cli: Cli, started: Started) -> None:
    os.mkfifo("pipe")
    assert cli("run", "tp2", "--prompts", "pipe").code == 4
    assert cli("run", "tp2", "--prompts", "-").code == 4
    assert len(started) == 2


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [warm_commands.python(), "-m", "reshard", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_check_says_what_the_ranks_say(folder: Path, checkpoint: Callable[..., Path]) -> None:
    """One error line, the rank's exit code, and nothing of torchrun's; `-v` after the command adds the traceback."""
    done = run("check", folder, "--reference", checkpoint("llama"), "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["ok"] is True
    flip(folder / RANK_FILES[1], -1)
    done = run("check", folder, "--reference", checkpoint("llama"), "-v")
    said = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert (done.returncode, done.stdout) == (4, "")
    assert len(said) == 1
    assert f"rank 1: {folder / RANK_FILES[1]}: tensor lm_head.weight was altered" in said[0]
    assert "Traceback" in done.stderr
    assert "ChildFailedError" not in done.stderr


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        ([], "ch", {"check"}),
        (["run"], "--temp", {"--temperature"}),
        (["run", "out"], "--qu", {"--quiet"}),
        (["run", "out", "--sdpa"], "", set(SDPA_BACKENDS)),
        (["check", "out", "--device"], "c", {"cpu", "cuda", "cuda:0"}),
        (["bench", "out", "--against"], "", set(ENGINES)),
        (["convert", "source", "out", "--dtype"], "b", {"bfloat16"}),
    ],
)
def test_completion(words: list[str], incomplete: str, expected: set[str]) -> None:
    found = ShellComplete(offline, {}, "reshard", "_RESHARD_COMPLETE").get_completions(words, incomplete)
    assert {item.value for item in found} == expected


@pytest.mark.parametrize("name", ["run", "check", "bench"])
def test_completion_of_a_folder(name: str) -> None:
    [item] = ShellComplete(offline, {}, "reshard", "_RESHARD_COMPLETE").get_completions([name], "ou")
    assert (item.type, item.value) == ("file", "ou")


def test_completion_in_a_shell() -> None:
    """Completion works as the commands' page says: by the console script's name, and without torch."""
    script = Path(sys.executable).parent / "reshard"
    asked = {"_RESHARD_COMPLETE": "bash_complete", "COMP_WORDS": "reshard run out --sd", "COMP_CWORD": "3"}
    done = subprocess.run([script], env={**os.environ, **asked}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "plain,--sdpa\n", "")
    source = subprocess.run(
        [script], env={**os.environ, "_RESHARD_COMPLETE": "bash_source"}, capture_output=True, text=True, timeout=60
    )
    assert (source.returncode, "complete -o" in source.stdout) == (0, True)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows by /proc what a process has imported")
def test_an_interrupted_rank_leaves_the_words_to_its_launcher(tmp_path: Path) -> None:
    """The rank prints nothing, even while it imports: once each rank's traceback stood before the line."""
    command = [sys.executable, "-P", "-m", "reshard.launch.rank", "generate", str(tmp_path), "--prompt", "Once"]
    ranked = {**os.environ, "TORCHELASTIC_RUN_ID": "x"}
    with subprocess.Popen(command, env=ranked, stderr=subprocess.PIPE, text=True) as rank:
        while rank.poll() is None and "libtorch" not in Path(f"/proc/{rank.pid}/maps").read_text():
            time.sleep(0.01)
        rank.send_signal(signal.SIGINT)
        assert rank.communicate(timeout=60)[1] == ""
    assert rank.returncode == -signal.SIGINT

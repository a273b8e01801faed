"""Progress and notes of the commands on stderr; the library itself prints nothing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shlex
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import warm_ranks
from cli_tools import ESCAPED, EVIL, FIRST, Checkpoint, Cli, assert_one_error, convert

import reshard
import reshard.operations.convert.work
import reshard.operations.plan
from reshard.cli import speaking
from reshard.cli.convert import next_command
from reshard.cli.speaking import progress_bar
from reshard.planning.model.model import read_model
from reshard.showing.tables import table

if TYPE_CHECKING:
    from fake_hub import FakeHub


NOTE = "left behind: model.py"


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan with a remark."""

    def remarking(*arguments: Any, **options: Any) -> Any:
        return replace(read_model(*arguments, **options), notes=(NOTE, f"a tensor {EVIL}"))

    monkeypatch.setattr(reshard.operations.plan, "read_model", remarking)


@pytest.mark.usefixtures("noted")
def test_notes_of_a_plan(source: Path, out: Path, cli: Cli) -> None:
    assert NOTE in cli("plan", source, "--tp-size", 2).out.splitlines()
    assert json.loads(cli("plan", source, "--tp-size", 2, "--format", "json").out)["notes"] == [
        NOTE,
        f"a tensor {EVIL}",
    ]
    done = cli(*convert(source, out), aloud=True)
    assert done.code == 0
    assert done.err.splitlines()[1:3] == [NOTE, f"a tensor {ESCAPED}"]


@pytest.mark.usefixtures("noted")
def test_notes_in_python(source: Path, out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert reshard.plan(source, tp_size=2).notes[0] == NOTE
    said: list[str] = []
    reshard.convert(source, out, tp_size=2, say=said.append)
    assert NOTE in said
    assert capfd.readouterr() == ("", "")


class Progress:
    """A `progress` that records what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []

    @contextlib.contextmanager
    def __call__(self, total: int, what: str) -> Iterator[Callable[[int], object]]:
        sizes: list[int] = []
        yield sizes.append
        self.told.append((what, total, sum(sizes)))


def test_progress_is_one_thing(source: Path, out: Path, tmp_path: Path) -> None:
    """Every operation reports in the same way, and what is done adds up to the announced total."""
    progress = Progress()
    reshard.convert(source, out, tp_size=2, progress=progress)
    reshard.verify(out, against=source, progress=progress)
    reshard.merge(out, tmp_path / "merged", progress=progress)
    assert [what for what, _, _ in progress.told] == ["writing", "checking", "comparing", "writing", "checking"]
    size = sum(path.stat().st_size for path in out.iterdir() if path.name != "reshard.json")
    assert progress.told[1] == ("checking", size, size)
    for what, total, done in progress.told:
        assert total * 0.9 < done <= total, what  # headers are not counted
        assert done > 90_000


def test_progress_of_the_hub(here: FakeHub, resharded: Path, tmp_path: Path) -> None:
    progress = Progress()
    reshard.publish(resharded, "org/model", licence="mit", progress=progress)
    reshard.pull("org/model", ranks=[0], progress=progress)
    assert [what for what, _, _ in progress.told] == ["checking", "fetching", "checking"]
    assert all(total == done > 0 for _, total, done in progress.told)
    reshard.merge("org/model", tmp_path / "merged", progress=progress)
    assert [what for what, _, _ in progress.told[3:]] == ["fetching", "writing", "checking"]
    assert progress.told[3][2] > 50_000  # the file of the other rank


@pytest.mark.usefixtures("store")
def test_progress_of_a_store(source: Path) -> None:
    progress = Progress()
    reshard.convert(source, "s3://bucket/out", tp_size=2, progress=progress)
    reshard.pull("s3://bucket/out", progress=progress)
    assert [what for what, _, _ in progress.told] == ["writing", "sending", "fetching", "checking"]
    assert all(total * 0.9 < done <= total for _, total, done in progress.told)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speaking, "_EVERY", 0.05)


@pytest.mark.usefixtures("often")
def test_a_line_now_and_then_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar(4_000_000, "writing") as report:
        report(1_000_000)
        time.sleep(0.08)
        report(2_000_000)
        time.sleep(0.2)
    lines = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"writing: 1\.0 MB of 4\.0 MB \(25%\), [\d.]+ MB/s, [\d.]+ s left", lines[0])
    assert lines[-1] == "writing: 3.0 MB of 4.0 MB (75%), 0 B/s"  # a standstill is reported
    assert not [thread for thread in threading.enumerate() if thread.name == "reshard-progress"]


@pytest.mark.usefixtures("often")
def test_a_total_that_is_not_known(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar(0, "fetching") as report:
        report(5000)
        time.sleep(0.08)
    assert re.fullmatch(r"fetching: 5\.0 kB, [\d.]+ kB/s", capfd.readouterr().err.splitlines()[0])


def test_short_work_has_no_line(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar(10, "writing") as report:
        report(10)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("often")
def test_quiet(source: Path, out: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch)
    for line in ([*convert(source, out), "--quiet"], ["verify", out, "-q"]):
        assert cli(*line, aloud=True).err == ""


@pytest.mark.usefixtures("often")
def test_lines_of_a_command(source: Path, out: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch)
    first, *lines, last = cli(*convert(source, out), aloud=True).err.splitlines()
    assert first == f"planning {source} for 2 ranks"
    assert lines
    assert all(line.startswith("writing: ") for line in lines)
    assert last == f"next: reshard check {out} --reference {source}"  # the model has no tokenizer


def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delay every write of files."""
    write = reshard.operations.convert.work.write_files

    def waiting(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.2)
        return write(*arguments, **options)

    monkeypatch.setattr(reshard.operations.convert.work, "write_files", waiting)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (61, "61 s"), (300, "5 min"), (7100, "118 min"), (7500, "2 h 5 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert speaking.duration(seconds) == words


def terminal(*arguments: object, width: int = 80, **variables: str) -> str:
    """Return what a command shows on a terminal."""
    read, write = pty.openpty()
    fcntl.ioctl(write, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {**os.environ, "TERM": "xterm", **variables}
    environment.pop("COLUMNS", None)
    command, shown = ("-m", "reshard", *map(str, arguments)), b""
    with ThreadPoolExecutor(1) as pool:
        files = (write, write, write)
        job = pool.submit(warm_ranks.run, 1, *command, timeout=60, environment=environment, files=files)
        while (waiting := select.select([read], [], [], 0.02)[0]) or not job.done():
            if waiting:
                shown += os.read(read, 65536)
    os.close(read)
    os.close(write)
    assert job.result().returncode == 0, shown
    return shown.decode().replace("\r\n", "\n")


def test_a_bar_on_a_terminal(source: Path, out: Path) -> None:
    shown = terminal(*convert(source, out))
    assert re.search(r"\rwriting: +\d+%", shown)
    assert "\rchecking: " in terminal("verify", out)
    assert "\r" not in terminal("verify", out, TERM="dumb")
    assert "checking" not in terminal("verify", out, "--quiet")


def test_the_end_of_a_conversion(checkpoint: Checkpoint, source: Path, out: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli(*convert(source, out), aloud=True)
    assert re.fullmatch(rf"{out}: 2 rank files, [\d,]+ bytes, in [\d.]+ s\n", done.out)
    again = cli("convert", out, tmp_path / "again", "-tp", 1, aloud=True)
    assert again.err.splitlines()[-1] == f"next: reshard verify {tmp_path / 'again'}"
    (source / "tokenizer.json").write_text("{}")
    spaced = tmp_path / "a folder"
    assert cli(*convert(source, spaced), aloud=True).err.splitlines()[-1] == (
        f"next: reshard run '{spaced}' --prompt 'Once upon a time'"
    )


def test_what_the_end_of_a_conversion_says_to_do_can_be_done(source: Path, out: Path, tmp_path: Path, cli: Cli) -> None:
    """The next command repeats the options that say where the weights are."""
    inside, store = source / "fp16", tmp_path / "a store"
    inside.mkdir()
    for file in source.glob("model*"):
        file.rename(inside / file.name)
    (inside / FIRST).rename(store.with_name(FIRST))
    store.mkdir()
    (inside / FIRST).symlink_to(store.with_name(FIRST).rename(store / FIRST))
    done = cli(*convert(source, out, "--weights", "fp16", "--links-into", store), aloud=True)
    last = done.err.splitlines()[-1]
    assert last == f"next: reshard verify {out} --against {source} --weights fp16 --links-into '{store}'"
    assert cli(*shlex.split(last.removeprefix("next: reshard "))).code == 0


def test_what_to_do_with_what_came_from_elsewhere(source: Path, out: Path) -> None:
    manifest = replace(reshard.convert(source, out, tp_size=2), repo_id="org/model")

    def line(place: str, **options: Any) -> str:
        return next_command(manifest, source=place, out="OUT", **options)

    assert line("org/model") == "reshard check OUT --reference org/model"
    assert line("org/model", revision="v2", dtype=None) == "reshard check OUT --reference org/model --revision v2"
    for resharded in ("org/cut/tp2", "hf://org/cut", "s3://bucket/cut"):  # one process cannot run a resharded source
        assert line(resharded) == "reshard verify OUT"


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_plan_announces_itself(style: str, source: Path, cli: Cli) -> None:
    assert cli("plan", source, "--tp-size", 2, "--format", style, aloud=True).err == f"planning {source} for 2 ranks\n"
    found = cli("plan", source, "--gpu-memory", "24GB", "--format", style, aloud=True)
    assert found.err == f"planning {source} for the fewest ranks\n"


def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if anything is planned or fetched."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it was looked at")

    for name in (
        "reshard.operations.convert.work.open_origin",
        "reshard.operations.reference.fetch_whole",
        "reshard.operations.merge.fetch",
    ):
        monkeypatch.setattr(name, fail)


COMMANDS = [
    ["convert", "org/model", "OUT", "--tp-size", 2],
    ["convert", "org/model", "OUT", "--tp-size", 2, "--reference-logits", "--strategies", "STYLES"],
    ["merge", "org/model/tp2", "OUT"],
]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_in_the_way_is_seen_first(
    command: list[Any], out: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    unread(monkeypatch)
    styles = tmp_path / "styles.py"
    styles.write_text("raise SystemExit('it was run')")
    line = [{"OUT": out, "STYLES": styles}.get(word, word) for word in command]
    with open(f"{out}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_one_error(cli(*line), 6, "out.lock")
    out.mkdir()
    assert_one_error(cli(*line), 7, "out: already exists")


def tables(text: str) -> list[list[str]]:
    """Return the lines of each table of a report."""
    return [block.splitlines() for block in text.split("\n\n") if "  " in block.strip().splitlines()[0]]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_tables_fit_the_terminal(width: int, source: Path, folder: Path) -> None:
    for line in (["plan", source, "--tp-size", "2"], ["inspect", folder]):
        shown = tables(terminal(*line, width=width, NO_COLOR="1"))
        assert len(shown) == 2 + (line[0] == "inspect")  # the bars too
        for rows in shown:
            assert max(map(len, rows)) <= width
        assert [row for row in shown[0] if "…" in row]
        names = [row.split()[0] for row in shown[0][1:]]
        assert all(name[0] in "ml" for name in names)  # never wrapped: model…, lm_head…
        if width >= 80:
            assert any("q_proj.weight" in name for name in names)


def test_a_table_is_whole_where_there_is_no_terminal(source: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    whole = cli("plan", source, "--tp-size", 2).out
    assert "model.layers.*.self_attn.q_proj.weight" in whole
    assert "no rule in the tp_plan" in whole
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, tables(cli("plan", source, "--tp-size", 2).out)[0])) <= 80


@pytest.mark.parametrize("width", range(24, 140, 9))
def test_any_table_in_any_width(width: int) -> None:
    lines = [("parameter", "×", "style"), ("model.layers.*.self_attn.q_proj.weight" * 2, "80", "colwise" * 9)]
    shown = table(lines, width=width, shorten=((2, 12), (0, 21))).splitlines()
    assert max(map(len, shown)) <= width
    assert shown[1].split()[0].endswith("weight"[-2:])
    assert table([("name",), ("a.b",)], width=2).splitlines()[1].strip() == "…"  # the narrowest possible


def test_no_colour_in_a_table(source: Path) -> None:
    assert "\x1b" not in terminal("plan", source, "--tp-size", "2", NO_COLOR="1")
    assert "\x1b" not in terminal("plan", source, "--tp-size", "2", TERM="dumb")

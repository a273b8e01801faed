"""Switches that every command takes anywhere in its line (`-v`, `--quiet`), and failures as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from cli_tools import Cli, convert, first_file

import reshard
import reshard.cli.main
import reshard.operations.plan
from reshard.launch.failures import report_failure
from reshard.launch.switches import in_colour, is_quiet, switches_of


@pytest.mark.parametrize("name", sorted(reshard.cli.main.cli.commands))
@pytest.mark.parametrize("switch", ["-v", "--verbose", "-q", "--quiet"])
def test_every_command_takes_them_before_and_behind(switch: str, name: str) -> None:
    command = reshard.cli.main.cli.commands[name]
    assert switch in {given for parameter in command.params for given in parameter.opts}
    found: list[list[str]] = []
    required = ["--tp-size", "2"] if name == "convert" else []
    names = [f"argument-{at}" for at, p in enumerate(command.params) if p.required and isinstance(p, click.Argument)]
    before, command.callback = command.callback, lambda **_: found.append(switches_of())
    try:
        for line in (
            [switch, name, *names, *required],
            [name, switch, *names, *required],
            [name, *names, *required, switch],
        ):
            reshard.cli.main.cli.main(line, standalone_mode=False)
    finally:
        command.callback = before
    assert found == [["--verbose" if "v" in switch else "--quiet"]] * 3
    assert not is_quiet()  # the switch ends with its command


def test_commands_of_a_rank_take_them_too() -> None:
    from runtime.__main__ import cli as ranks

    assert len(ranks.commands) >= 3
    for command in ranks.commands.values():
        assert {"-v", "-q"} <= {given for parameter in command.params for given in parameter.opts}


def test_verbose_behind_the_command(source: Path, out: Path, cli: Cli) -> None:
    first_file(source).unlink()
    assert "Traceback (most recent call last)" in cli(*convert(source, out, "-v")).err
    assert "Traceback (most recent call last)" in cli(*convert(source, out, "-qv")).err
    assert "Traceback (most recent call last)" not in cli(*convert(source, out, "-q")).err


def error_object(text: str) -> dict[str, object]:
    found = json.loads(text)
    assert list(found) == ["error", "hint", "exit_code", "kind"]
    assert text.count("\n") == 1
    return dict(found)


@pytest.mark.parametrize("style", [["--format", "json"], ["--format=json"]])
def test_errors_as_json(style: list[str], source: Path, folder: Path, cli: Cli) -> None:
    result = cli(*convert(source, folder, *style))
    found = error_object(result.err)
    assert (result.code, result.out) == (7, "")
    assert (found["exit_code"], found["kind"]) == (7, "DestinationExistsError")
    assert str(found["error"]).endswith("out: already exists")
    assert "--overwrite" in str(found["hint"])
    assert issubclass(getattr(reshard, str(found["kind"])), reshard.ReshardError)


@pytest.mark.parametrize(
    "arguments",
    [["convert", "source"], ["plan", "source", "--tp-size", "two"], ["inspect", "a", "--nope"], ["frobnicate"], []],
)
def test_usage_errors_as_json(arguments: list[str], cli: Cli) -> None:
    result = cli(*arguments, "--format", "json")
    found = error_object(result.err)
    assert (result.code, result.out, found["exit_code"], found["kind"]) == (2, "", 2, "UsageError")
    assert str(found["hint"]).endswith("--help")
    assert "Usage:" not in str(found["error"])


def test_unexpected_errors_as_json(source: Path, out: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a \x1b[31m\x7f surprise")

    monkeypatch.setattr(reshard.operations.plan, "plan_layouts", fail)
    result = cli(*convert(source, out, "--format", "json"))
    found = error_object(result.err)
    assert (result.code, found["exit_code"], found["kind"]) == (1, 1, "RuntimeError")
    assert all(c == "\n" or c.isprintable() for c in result.err)


def test_an_interruption_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    error = KeyboardInterrupt()
    error.__dict__["hint"] = "the same command goes on"
    assert report_failure(error, verbose=False, as_json=True) == 130
    found = error_object(capfd.readouterr().err)
    assert found == {
        "error": "interrupted",
        "hint": "the same command goes on",
        "exit_code": 130,
        "kind": "KeyboardInterrupt",
    }


def test_a_rank_speaks_json_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "runtime", "generate", str(tmp_path), "--prompt", "Once", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = error_object(done.stderr)
    assert (done.returncode, done.stdout, found["exit_code"], found["kind"]) == (3, "", 3, "BadInputError")


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, None),
        ({"NO_COLOR": ""}, None),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        ({"FORCE_COLOR": "1"}, True),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": "xterm"}, None),
    ],
)
def test_colours(environment: dict[str, str], wanted: bool | None) -> None:
    assert in_colour(environment) is wanted


@pytest.mark.parametrize(("name", "coloured"), [("FORCE_COLOR", True), ("NO_COLOR", False)])
def test_colours_of_an_error(name: str, coloured: bool, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    result = cli("verify", "/nowhere/at/all")
    assert ("\x1b[31mError: " in result.err) == ("\x1b[2mHint: " in result.err) == coloured

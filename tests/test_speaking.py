"""What the commands say while they work: on stderr, and nothing of it by the library itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_tools import ESCAPED, EVIL, Cli, convert

import reshard
import reshard.conversion
from reshard.model import read_model

NOTE = "left behind: model.py"


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that has something to remark."""

    def remarking(*arguments: Any, **options: Any) -> Any:
        return replace(read_model(*arguments, **options), notes=(NOTE, f"a tensor {EVIL}"))

    monkeypatch.setattr(reshard.conversion, "read_model", remarking)


@pytest.mark.usefixtures("noted")
def test_notes_of_a_plan(source: Path, out: Path, cli: Cli) -> None:
    assert NOTE in cli("plan", source, "--tp-size", 2).out.splitlines()
    assert json.loads(cli("plan", source, "--tp-size", 2, "--format", "json").out)["notes"] == [
        NOTE,
        f"a tensor {EVIL}",
    ]
    done = cli(*convert(source, out))
    assert done.code == 0
    assert done.err.splitlines()[-2:] == [NOTE, f"a tensor {ESCAPED}"]


@pytest.mark.usefixtures("noted")
def test_notes_in_python(source: Path, out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert reshard.plan(source, tp_size=2).notes[0] == NOTE
    said: list[str] = []
    reshard.convert(source, out, tp_size=2, say=said.append)
    assert NOTE in said
    assert capfd.readouterr() == ("", "")

"""Every command and every script of the README, run as it stands, in its order, on a pico model."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import object_store
import pico
import pytest
from cli_tools import link
from fake_hub import FakeHub
from places import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
COMMANDS = [
    line.split("  #")[0].strip()
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if line.startswith(("reshard ", "torchrun ", "scripts/", "python -m "))
]
NAMED = re.compile(r"# (\w+\.(?:py|toml))\n")
FILES = {match[1]: block for _, block in BLOCKS if (match := NAMED.match(block))}
SCRIPTS = [block for language, block in BLOCKS if language == "python" and not NAMED.match(block)]
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
ENVIRONMENT = {"PATH": PATH, "OMP_NUM_THREADS": "1"}


def run(*command: str, folder: Path, **variables: str) -> str:
    there = {**os.environ, **variables, **ENVIRONMENT}
    done = subprocess.run(command, cwd=folder, env=there, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where SOURCE is a pico model with a tokenizer, MOE one with experts, LINKS and VARIANT have their weights
    elsewhere, and the README's own files are there."""
    root = tmp_path_factory.mktemp("readme")
    run(sys.executable, str(ROOT / "scripts" / "make_pico.py"), "SOURCE", folder=root)
    (root / "SOURCE" / "recipe.yaml").write_text("steps: 1\n")
    pico.save("qwen3_moe", root / "MOE")
    pico.build("llama").save_pretrained(root / "VARIANT", variant="fp16")
    pico.save("llama", root / "LINKS")
    (root / "store").mkdir()
    for path in (root / "LINKS").glob("*.safetensors"):
        link(path, root / "store" / path.name)
    for name, text in FILES.items():
        (root / name).write_text(text)
    return root


def test_commands(folder: Path, hub: FakeHub) -> None:
    said = {}
    contents = {path.name: path.read_bytes() for path in (folder / "SOURCE").iterdir()}
    hub.create("org/llama", {**contents, "README.md": b"---\nlicense: apache-2.0\n---\n"})
    with object_store.serve() as store:
        store.put("llama", contents)
        variables = {**hub.environment(folder / "home"), **store.environment(folder)}
        for command in COMMANDS:
            if command.startswith("scripts/"):  # the demo is the same commands; the tests would run themselves
                assert os.access(ROOT / command.split()[0], os.X_OK)
            else:
                said[command] = run(*shlex.split(command), folder=folder, **variables)
        assert "reshard.json" in store.objects("llama-tp4")
    assert "apache-2.0" in hub.repos["org/model"].files["README.md"].decode()
    assert {"plan", "convert", "verify", "run", "publish", "pull"} <= {command.split()[1] for command in said}
    generated = {command: text for command, text in said.items() if "--prompt" in command}
    [batch] = [generated.pop(command) for command in list(generated) if "--format json" in command]
    found = [json.loads(line) for line in batch.splitlines()]
    assert [one["ended"] for one in found] == ["stop", "stop"]
    assert found[1]["text"] == " every rank opened the whole "
    assert len(generated) == 4
    for text in generated.values():
        assert text.startswith("Once upon a time every rank opened the whole checkpoint")
    checked = [text for command, text in said.items() if " check " in command]
    assert len(checked) == 6
    assert all("tokens equal" in text for text in checked)
    assert next(text for command, text in said.items() if "--per-layer" in command).endswith("no module differs\n")
    one_command, on_ranks = (text for command, text in said.items() if " bench " in command)
    assert "reshard tp 1" in one_command
    assert all("reshard tp 2" in text for text in (one_command, on_ranks))
    assert (folder / "speed-up.png").read_bytes().startswith(b"\x89PNG")


def test_python(folder: Path, tmp_path: Path) -> None:
    offline, online = SCRIPTS
    (tmp_path / "SOURCE").symlink_to(folder / "SOURCE")
    (tmp_path / "offline.py").write_text(offline)
    (tmp_path / "online.py").write_text(online + "\nprint(tuple(tokens.shape), tuple(weight.shape))\n")
    run(sys.executable, "offline.py", folder=tmp_path)
    said = run("torchrun", "--standalone", "--nproc-per-node", "2", "online.py", folder=tmp_path)
    assert (said.count("(1, 7)"), said.count("(330, 64)")) == (2, 2)  # the ranks' lines may mix


def test_map_of_the_house() -> None:
    """Every module is on the map, and the map has no others."""
    block = next(block for _, block in BLOCKS if block.startswith("reshard/  "))
    house = {line.split()[0].rstrip("/") for line in block.splitlines() if not line.startswith(" ")}
    named = set(re.findall(r"[\w]+\.py\b", block)) | {"strategies", "hub", "commands", "cli", "launch"}
    there = {path.name for package in house for path in (ROOT / package).iterdir() if not path.name.startswith("_")} - {
        *("py.typed", "manifest.schema.json"),
    }
    assert named == there


def test_styles_named() -> None:
    from reshard.strategies import ALL_PARALLEL_STYLES

    section = README.split("## Styles")[1].split("##")[0]
    assert set(re.findall(r"`(\w+)`", section)) == set(ALL_PARALLEL_STYLES)


def test_ci_runs_the_readme_test_command() -> None:
    assert "\nscripts/test" in (ROOT / ".ci" / "run").read_text()

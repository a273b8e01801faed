"""`reshard env`: what an issue should tell, without secrets, and without failing if something is broken."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import warm_commands
from cli_tools import Cli

import reshard
import reshard.operations.environment
from reshard.operations.environment import environment

SECRETS = ("hf_abcdefghijklmnop", "hunter2", "alice", "AKIA123")


def test_what_it_tells(cli: Cli) -> None:
    text, found = cli("env"), cli("env", "--format", "json")
    assert (text.code, text.err, found.code, found.err) == (0, "", 0, "")
    report = json.loads(found.out)
    assert report["reshard"] == reshard.__version__
    assert report["packages"]["torch"] == torch.__version__
    assert report["devices"]["gpus"] == [
        {
            "name": torch.cuda.get_device_properties(index).name,
            "memory": torch.cuda.get_device_properties(index).total_memory,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
        }
        for index in range(torch.cuda.device_count())
    ]
    assert report["memory"] > 1 << 28
    assert [cache["name"] for cache in report["caches"]] == ["hub", "reshard"]
    for words in (f"torch {torch.__version__}", "CPUs", "GPUs", "token: ", "cache (hub)"):
        assert words in text.out


def test_no_secrets(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "alice"
    (home / ".cache" / "reshard").mkdir(parents=True)
    (home / ".cache" / "reshard" / "fetched").write_bytes(b"x" * 1000)
    variables = {
        "HOME": str(home),
        "HF_TOKEN": "hf_abcdefghijklmnop",
        "HF_ENDPOINT": "https://alice:hunter2@hub.example/",
        "HTTPS_PROXY": "http://alice:hunter2@proxy:3128",
        "AWS_ACCESS_KEY_ID": "AKIA123",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "HF_HOME": f"{home}/hf",
        "NCCL_SOCKET_IFNAME": "eth0",
        "TORCH_SOME_TOKEN": "hunter2",
        "TRANSFORMERS_NOTE": "hf_abcdefghijklmnop",
        "MY_OWN": "alice",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", variables["HF_ENDPOINT"])
    monkeypatch.setattr(sys, "executable", sys.executable)
    for style in ("text", "json"):
        out = cli("env", "--format", style).out
        assert not [secret for secret in SECRETS if secret in out], out
    report = environment()
    assert report["hub"]["token"] is True
    assert report["hub"]["endpoint"] == "https://hub.example/"
    assert report["variables"]["HF_HOME"] == "~/hf"
    assert report["variables"]["NCCL_SOCKET_IFNAME"] == "eth0"
    assert {report["variables"][name] for name in ("HTTPS_PROXY", "AWS_ACCESS_KEY_ID", "HF_TOKEN")} == {"(set)"}
    assert report["variables"]["TORCH_SOME_TOKEN"] == "(set)"
    assert "MY_OWN" not in report["variables"]
    cache = report["caches"][1]
    assert (cache["folder"], cache["size"], cache["complete"]) == ("~/.cache/reshard", 1000, True)


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise ImportError('libcudart.so.12: cannot open shared object file')", "ImportError: libcudart.so.12"),
        ("import os; os._exit(139)", "torch ended its process (139)"),
        ("print('hello'); raise SystemExit(0)", "torch ended its process (0)"),
        ("import time; time.sleep(60)", "torch did not answer within 1 s"),
    ],
)
def test_a_torch_that_is_broken(
    code: str, problem: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(reshard.operations.environment, "_PROBE_SECONDS", 1.0 if "sleep" in code else 20.0)
    began = time.monotonic()
    result = cli("env", "--format", "json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["devices"]["problem"].startswith(problem)
    assert time.monotonic() - began < 15
    assert problem in cli("env").out


def test_a_client_of_the_hub_that_is_broken(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", warm_commands.python())
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr(reshard.operations.environment, "_PACKAGES", ("torch", "no-such-package"))
    report = json.loads(cli("env", "--format", "json").out)
    assert "problem" in report["hub"]
    assert [cache["name"] for cache in report["caches"]] == ["reshard"]
    assert report["packages"]["no-such-package"] is None
    assert "no-such-package" in cli("env").out


def test_a_cache_that_is_too_large_to_look_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", warm_commands.python())
    for name in ("a", "b"):
        (tmp_path / "reshard" / name).mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(reshard.operations.environment, "_WALK_SECONDS", -1.0)
    assert environment()["caches"][1]["complete"] is False

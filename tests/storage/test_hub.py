"""The Hub, through the real client against a stand-in on loopback: convert from it, publish to it, load from it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import socketserver
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import hf_extension
import pytest
import torch
import transformers
from cli_tools import RANK_FILES, Cli, assert_one_error
from fake_hub import FakeHub, Handler, Reply, corrupt
from places import ROOT

import reshard
import runtime
import runtime.loading.locate
from reshard.errors import IntegrityError, NetworkError, TopologyError
from runtime.distributed.agreement import Deadline

# Files beside the checkpoint that nobody asked for.
UNWANTED = {
    "README.md": b"# A model\n",
    "pytorch_model.bin": b"\x80\x04.",
    "training_args.bin": b"\x80\x04.",
    "modeling_llama.py": b"raise SystemExit('code was run')\n",
    "original/consolidated.00.pth": b"\x80\x04.",
    "onnx/config.json": b"{}",
    "onnx/model.safetensors": b"junk",
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": b"junk",
    "consolidated.safetensors": b"junk",
}
# With "apart", each rank has its own cache, which shows what the rank fetched.
LOAD = """
import os, sys
place, *apart = sys.argv[1:]
out = os.path.join(os.environ["HF_HOME"], os.environ.get("RANK", "0"))
os.makedirs(out, exist_ok=True)
if apart:
    from huggingface_hub import constants

    constants.HF_HUB_CACHE = os.path.join(out, "hub")
import torch
import runtime
from runtime.distributed.mesh import shut_down

model = runtime.load(place)
with torch.inference_mode():
    logits = model(torch.arange(3, 12)[None]).logits
torch.save(logits, os.path.join(out, "logits.pt"))
shut_down()
"""
AGENT = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def one_rank(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama checkpoint on one rank. Read only."""
    folder = tmp_path_factory.mktemp("one-rank") / "llama-tp1"
    reshard.convert(checkpoint("llama"), folder, tp_size=1)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_conversion(out: Path, local: Path, *, commit: str) -> None:
    """Check that `out` is `local`, but for the source that the manifest names."""
    found, expected = contents(out), contents(local)
    manifest = found.pop("reshard.json"), expected.pop("reshard.json")
    assert found == expected
    assert manifest[0] != manifest[1]
    assert reshard.inspect(out) == dataclasses.replace(reshard.inspect(local), repo_id="org/model", commit=commit)


def assert_network_error(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 10, done.stderr
    assert done.stdout == ""
    error, hint = done.stderr.splitlines()
    assert error.startswith("Error: ")
    assert words in error
    assert hint.startswith("Hint: ")


@pytest.mark.fault(27)
def test_convert_then_again_without_the_network(
    hub: FakeHub, home: Path, python: Command, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The result equals a local conversion; only safetensors and small root files are fetched; no token leaks."""
    canary = "hf_canary_PxQ7vJ2mW9"
    source = checkpoint("llama")
    reshard.convert(source, tmp_path / "local", tp_size=2)
    repo = hub.create("org/model", {**contents(source), **UNWANTED}, token=canary)

    keep = ("-m", "reshard", "convert", "org/model", tmp_path / "out", "--tp-size", 2, "--keep-cache")
    done = python(*keep, token=canary)
    assert done.returncode == 0, done.stderr
    assert_same_conversion(tmp_path / "out", tmp_path / "local", commit=repo.revisions["main"])
    assert hub.asked("org/model") == set(contents(source))
    assert not [path for path in (tmp_path / "out").rglob("*") if canary.encode() in path.read_bytes()]
    assert canary not in done.stdout + done.stderr

    hub.requests.clear()
    command = ("-m", "reshard", "convert", "org/model", tmp_path / "again", "--tp-size", 2)
    again = python(*command, token=canary, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert hub.requests == []
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_resharded_repo_is_a_source(
    hub: FakeHub, python: Command, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A repo cut for two ranks is cut for four here, without the checkpoint itself."""
    for size in (2, 4):
        reshard.convert(checkpoint("llama"), tmp_path / f"tp{size}", tp_size=size)
    hub.create("org/model-tp2", {**contents(tmp_path / "tp2"), **UNWANTED})
    done = python("-m", "reshard", "convert", "org/model-tp2", tmp_path / "out", "--tp-size", 4)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "tp4")
    assert hub.asked("org/model-tp2") == set(contents(tmp_path / "tp2"))


def test_a_folder_of_a_repo_is_a_source(here: FakeHub, one_rank: Path, resharded: Path, tmp_path: Path) -> None:
    here.create("org/model", {f"tp1/{name}": data for name, data in contents(one_rank).items()})
    reshard.convert("org/model/tp1", tmp_path / "out", tp_size=2)
    assert contents(tmp_path / "out") == contents(resharded)


@pytest.mark.fault(27)
def test_no_command_tells_the_token(
    hub: FakeHub, python: Command, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The token is in no output, traceback or file, whether the command ends well or not."""
    canary = "hf_canary_Zt4LkQ8sB1"
    hub.create("org/model", contents(checkpoint("llama")), token=canary)
    out, again = tmp_path / "out", tmp_path / "again"
    commands = {
        ("plan", "org/model", "--tp-size", 2): 0,
        ("convert", "org/model", out, "--tp-size", 2): 0,
        ("convert", "org/model", out, "--tp-size", 2, "--overwrite", "--format", "json"): 0,
        ("convert", "org/model", out, "-tp", 2): 7,
        ("convert", "org/missing", again, "--tp-size", 2): 10,
        ("inspect", "org/model"): 3,
        ("inspect", out): 0,
        ("verify", out, "--against", "org/model"): 0,
        ("verify", out, "--against", "org/missing"): 10,
        ("merge", out, again): 0,
        ("merge", out, again, "--no-sync"): 7,
        ("publish", out, "org/tp2", "--private"): 0,
        ("publish", out, "org/tp2", "--private", "--format", "json"): 0,
        ("publish", out, "org/open"): 11,
        ("publish", out, "org/model", "--private"): 7,
        ("publish", again, "org/tp2"): 3,
        ("pull", "org/tp2", "--rank", 1): 0,
        ("pull", "org/tp2", "--rank", 7): 9,
        ("pull", "org/tp2", "--to", tmp_path / "to"): 0,
        ("pull", "org/missing"): 10,
        ("run", "org/missing", "--prompt", "x"): 10,
    }
    for command, code in commands.items():
        done = python("-m", "reshard", "-v", *command, token=canary)
        assert done.returncode == code, (command, done.stderr)
        assert done.stdout + done.stderr, command
        assert canary not in done.stdout + done.stderr, command
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and canary.encode() in path.read_bytes()]
    assert not [data for repo in hub.repos.values() for data in repo.files.values() if canary.encode() in data]


def test_revision(hub: FakeHub, python: Command, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint("llama")
    repo = hub.create("org/model", contents(source))
    first = repo.revisions["with/slash"] = repo.revisions["main"]
    assert repo.commit(contents(checkpoint("llama", seed=1))) != first

    command = ("-m", "reshard", "convert", "org/model", tmp_path / "out", "--tp-size", 2, "--revision", "with/slash")
    done = python(*command)
    assert done.returncode == 0, done.stderr
    reshard.convert(source, tmp_path / "local", tp_size=2)
    assert_same_conversion(tmp_path / "out", tmp_path / "local", commit=first)


def test_inspect_an_older_commit(
    hub: FakeHub, python: Command, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    for seed in range(2):
        reshard.convert(checkpoint("llama", seed=seed), tmp_path / str(seed), tp_size=1 + seed)
    repo = hub.create("org/model-tp", contents(tmp_path / "0"))
    first = repo.revisions["main"]
    repo.commit(contents(tmp_path / "1"))
    older = python("-m", "reshard", "inspect", "org/model-tp", "--revision", first)
    newer = python("-m", "reshard", "inspect", "org/model-tp")
    assert older.stdout == python("-m", "reshard", "inspect", tmp_path / "0").stdout != newer.stdout
    assert newer.stdout == python("-m", "reshard", "inspect", tmp_path / "1").stdout != ""


def test_small_files_are_those_that_a_local_conversion_copies(hub: FakeHub, python: Command) -> None:
    small = ["config.json", "merges.txt", "LICENSE", "License.md", "NOTICE", "USE_POLICY.md", "chat_template.jinja"]
    hub.create("org/model", {**dict.fromkeys(small, b"{}"), "model.safetensors": b"", **UNWANTED})
    done = python("-c", "from reshard.storage.locate import look_at; look_at('org/model')")
    assert done.returncode == 0, done.stderr
    assert hub.asked("org/model") == set(small)


def test_as_a_part_of_the_hubs_command_line(
    python: Command, resharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`hf reshard …` runs the script of that name, which pip makes of the entry point."""
    assert 'hf-reshard = "reshard.cli.main:entry"' in (ROOT / "pyproject.toml").read_text()
    script = tmp_path / "hf-reshard"
    script.write_text(f"#!{sys.executable}\nfrom reshard.cli.main import entry\nentry()\n")
    script.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    hf_extension.register(script)
    hf = ("-m", "huggingface_hub.cli.hf")
    quiet = {"HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    done = python(*hf, "reshard", "inspect", resharded, **quiet)
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM" in done.stdout
    assert python(*hf, "reshard", "inspect", tmp_path / "none", **quiet).returncode == 3
    assert "reshard" in python(*hf, "extensions", "list", **quiet).stdout


def test_unknown_repo(hub: FakeHub, python: Command) -> None:
    assert_network_error(python("-m", "reshard", "inspect", "org/none"), "org/none: no such folder")
    hub.create("org/secret", token="hf_other")
    assert_network_error(python("-m", "reshard", "inspect", "org/secret"), "or it is private")


def test_unknown_revision(hub: FakeHub, python: Command) -> None:
    hub.create("org/model")
    done = python("-m", "reshard", "inspect", "org/model", "--revision", "gone")
    assert_network_error(done, "gone")
    assert "\\n" not in done.stderr


def test_server_gone(here: FakeHub, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeHub() as gone:
        pass
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", gone.url)
    assert_one_error(cli("convert", "org/model", tmp_path / "out", "--tp-size", 2), 10, "does not answer")
    assert list(tmp_path.glob("*out*")) == []


def test_server_hangs_up(here: FakeHub, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server closes the connection without an answer, as an overloaded proxy does."""
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        done = cli("inspect", "org/model")
        server.shutdown()
        thread.join()
    assert_one_error(done, 10, "org/model")


def test_repo_that_is_not_resharded(hub: FakeHub, python: Command) -> None:
    hub.create("org/model", {"config.json": b"{}"})
    done = python("-m", "reshard", "inspect", "org/model")
    assert done.returncode == 3, done.stderr
    (error,) = done.stderr.splitlines()
    assert "no reshard.json" in error


def test_load_in_one_process(here: FakeHub, one_rank: Path, checkpoint: Callable[..., Path]) -> None:
    here.create("org/model-tp1", contents(one_rank))
    assert_computes(runtime.load("org/model-tp1"), checkpoint("llama"))


def test_load_takes_the_degree_that_fits(here: FakeHub, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """If a repo holds several, the folder for the number of ranks is taken; else the error lists them."""
    source = checkpoint("llama")
    files = {}
    for size in (1, 2):
        reshard.convert(source, tmp_path / f"tp{size}", tp_size=size)
        files |= {f"tp{size}/{name}": data for name, data in contents(tmp_path / f"tp{size}").items()}
    here.create("org/model", files)
    model = runtime.load("org/model")
    assert_computes(model, source)
    assert Path(model.name_or_path).name == "tp1"
    assert not [path for path in here.asked("org/model") if path.startswith("tp2")]
    assert_computes(runtime.load(tmp_path), source)  # as for a folder on disk

    here.create("org/others", {name.replace("tp1", "tp4"): data for name, data in files.items()})
    with pytest.raises(TopologyError, match="holds no model for 1 ranks itself, but in folders: tp2, tp4"):
        runtime.load("org/others")
    with pytest.raises(TopologyError, match="org/others/tp2 was made for 2 ranks, not for 1"):
        runtime.load("org/others/tp2")
    assert {Path(path).name for path in here.asked("org/others")} == {"reshard.json"}


@pytest.mark.fault(16)
@pytest.mark.parametrize("name", [RANK_FILES[0], "config.json", "reshard.json"])
def test_load_keeps_no_wrong_bytes(name: str, here: FakeHub, home: Path, one_rank: Path) -> None:
    here.create("org/model", contents(one_rank))
    here.fail(f"GET .*/{name}", corrupt())
    with pytest.raises(IntegrityError):
        runtime.load("org/model")
    wrong = bytearray(contents(one_rank)[name])
    wrong[-1] ^= 1
    assert bytes(wrong) not in [path.read_bytes() for path in home.rglob("*") if path.is_file()]
    runtime.load("org/model")


def test_what_stops_rank_0_is_told_to_the_others(here: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks send no requests, and wait no longer than they are told to."""
    monkeypatch.setattr(runtime.loading.locate, "_calls", itertools.repeat(0))
    locate = functools.partial(
        runtime.loading.locate.locate_together, "org/none", revision=None, world_size=2, digests=True
    )
    store, end = torch.distributed.HashStore(), Deadline.after(5)
    with pytest.raises(NetworkError) as first:
        locate(first=True, rank=0, store=store, deadline=end)
    here.requests.clear()
    with pytest.raises(NetworkError) as second:
        locate(first=False, rank=1, store=store, deadline=end)
    assert (first.value.message, first.value.hint) == (second.value.message, second.value.hint)
    assert here.requests == []
    store, end = torch.distributed.HashStore(), Deadline.after(0.1)
    with pytest.raises(TopologyError, match="rank 0 does not say"):
        locate(first=False, rank=1, store=store, deadline=end)


def test_publish_inspect_and_load(
    hub: FakeHub, home: Path, python: Command, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """`hf upload` publishes a folder too; `inspect` fetches the manifest, and each rank its own file."""
    source = checkpoint("llama")
    reshard.convert(source, tmp_path / "out", tp_size=2)
    done = python("-m", "huggingface_hub.cli.hf", "upload", "org/model-tp2", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    published = dict(hub.repos["org/model-tp2"].files)
    published.pop(".gitattributes")
    assert published == contents(tmp_path / "out")

    hub.requests.clear()
    done = python("-m", "reshard", "inspect", "org/model-tp2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == python("-m", "reshard", "inspect", tmp_path / "out").stdout
    assert hub.asked("org/model-tp2") == {"reshard.json"}

    script = tmp_path / "load.py"
    script.write_text(LOAD)
    done = python(*AGENT, script, "org/model-tp2", "apart")
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert_logits(home / str(rank), source)
        fetched = [path.name for path in (home / str(rank)).rglob("snapshots/*/*.safetensors")]
        assert fetched == [f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"]


def test_ranks_take_one_commit_and_fetch_each_file_once(
    hub: FakeHub, home: Path, python: Command, resharded: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The repo moves on while the ranks start; then they start without the network."""
    repo = hub.create("org/model", {f"tp2/{name}": data for name, data in contents(resharded).items()})

    def move(_: Handler, answer: Callable[[], Reply]) -> Reply:
        repo.commit(dict.fromkeys(repo.files, b"another"))
        return answer()

    hub.fail("HEAD .*/tp2/reshard.json", move)
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    done = python(*AGENT, script, "org/model")
    assert done.returncode == 0, done.stderr
    got = Counter(request.path for request in hub.requests if request.method == "GET" and "/resolve/" in request.path)
    assert {Path(path).name for path in got} == set(contents(resharded))
    assert set(got.values()) == {1}
    assert hub.count("GET /api/models/org/model$") + hub.count("GET /api/models/org/model/revision/main") == 1
    assert {path.split("/")[4] for path in got} == {next(iter(repo.commits))}

    repo.revisions["main"] = next(iter(repo.commits))
    hub.requests.clear()
    again = python(*AGENT, script, "org/model", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert hub.requests == []
    for rank in range(2):
        assert_logits(home / str(rank), checkpoint("llama"))


def assert_logits(home: Path, source: Path) -> None:
    """Check that a rank of LOAD computed the logits of the source's model in this process."""
    torch.testing.assert_close(torch.load(home / "logits.pt"), expected_logits(source), rtol=1e-5, atol=1e-5)


def assert_computes(model: torch.nn.Module, source: Path) -> None:
    with torch.inference_mode():
        logits = model(torch.arange(3, 12)[None]).logits
    torch.testing.assert_close(logits, expected_logits(source), rtol=1e-5, atol=1e-5)


def expected_logits(source: Path) -> torch.Tensor:
    with torch.inference_mode():
        return transformers.AutoModelForCausalLM.from_pretrained(source)(torch.arange(3, 12)[None]).logits

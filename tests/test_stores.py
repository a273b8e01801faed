"""Checkpoints and resharded folders in an object store, against moto's S3 server: same bytes, and nothing half-done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import object_store
import pytest
import torch
from cli_tools import RANK_FILES, Checkpoint, Cli, assert_one_error
from object_store import Call, ObjectStore, error
from safetensors.torch import save_file

import reshard
from reshard import stores
from reshard.errors import (
    BadInputError,
    DestinationExistsError,
    IntegrityError,
    NetworkError,
    RemoteMovedError,
    TopologyError,
    UsageError,
)
from reshard.places import locate

MANIFEST = "reshard.json"


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with object_store.serve() as server:
        yield server


@pytest.fixture
def store(server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An empty bucket, whose server this process and those it starts take for S3."""
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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def source(store: ObjectStore, checkpoint: Checkpoint) -> str:
    """A llama in three files."""
    return store.put("llama", contents(checkpoint("llama")))


def kept(tmp_path: Path) -> list[Path]:
    """What is left of unfinished work."""
    return [path for path in (tmp_path / "cache/reshard/unfinished").glob("*") if path.suffix != ".lock"]


def test_from_a_store(store: ObjectStore, source: str, resharded: Path, checkpoint: Checkpoint, out: Path) -> None:
    """The same bytes as from a folder, manifest included; each byte of weights is asked for once, but for headers."""
    reshard.convert(source, out, tp_size=2)
    assert contents(out) == contents(resharded)
    weights = list(checkpoint("llama").glob("*.safetensors"))
    asked = sum(call.bytes[1] - call.bytes[0] for call in store.calls("GET", ".safetensors") if call.bytes)
    size = sum(path.stat().st_size for path in weights)
    assert size < asked <= size + len(weights) * (16 << 10)
    assert [path.name for path in out.parent.iterdir() if path.name.startswith("out")] == ["out"]


def test_files_are_removed_when_they_are_cut(
    source: str, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most, get = 0, stores.Store.get

    def watched(self: Any, name: str, folder: Path | None, *given_up: Any) -> Path:
        nonlocal most
        found = get(self, name, folder, *given_up)
        most = max(most, len(list(tmp_path.glob("out.part-fetched-*/model-*.safetensors"))))
        return found

    monkeypatch.setattr(stores.Store, "get", watched)
    reshard.convert(source, out, tp_size=2)
    assert 1 <= most <= 2


def test_keep_cache(store: ObjectStore, source: str, out: Path, tmp_path: Path) -> None:
    reshard.convert(source, out, tp_size=2, keep_cache=True)
    store.log.clear()
    reshard.convert(source, tmp_path / "again", tp_size=2)
    assert not store.calls("GET", ".safetensors")
    assert contents(out) == contents(tmp_path / "again")


def test_to_a_store(store: ObjectStore, checkpoint: Checkpoint, resharded: Path, tmp_path: Path) -> None:
    """The same bytes; the manifest is sent last, and nothing stays on this machine."""
    reshard.convert(checkpoint("llama"), "s3://bucket/out", tp_size=2)
    assert store.objects("out") == contents(resharded)
    sent = [call.path for call in store.log if call.method in ("PUT", "POST")]
    assert len(sent) == len(contents(resharded))
    assert sent[-1] == f"bucket/out/{MANIFEST}"
    assert not kept(tmp_path)


def test_from_store_to_store_and_on(store: ObjectStore, source: str, out: Path, checkpoint: Checkpoint) -> None:
    reshard.convert(source, "s3://bucket/tp4", tp_size=4)
    reshard.convert("s3://bucket/tp4", "s3://bucket/tp2", tp_size=2)
    reshard.convert(checkpoint("llama"), out, tp_size=2)
    assert store.objects("tp2") == contents(out)
    assert reshard.inspect("s3://bucket/tp2") == reshard.inspect(out)
    assert reshard.verify(out, against=source).elements


def test_large_files_are_sent_in_parts(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    """Of 5 MiB, which is S3's least; nobody sees a file before the last part is there."""
    monkeypatch.setitem(stores._PART, "chunksize", 5 << 20)
    source = tmp_path / "source"
    source.mkdir()
    for path in checkpoint("llama").glob("*.json"):
        if "index" not in path.name:
            (source / path.name).write_bytes(path.read_bytes())
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in checkpoint("llama").glob("*.safetensors"):
        tensors |= load_file(path)
    tensors["more"] = torch.arange(4 << 20, dtype=torch.float32)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    reshard.convert(source, "s3://bucket/out", tp_size=2)
    reshard.convert(source, tmp_path / "here", tp_size=2)
    assert store.objects("out") == contents(tmp_path / "here")
    parts = [call for call in store.calls("PUT", "unused.safetensors") if "partNumber" in call.query]
    assert len(parts) == 4
    assert not store.unfinished()
    reshard.convert("s3://bucket/out", tmp_path / "back", tp_size=2)  # 16 MiB, so in several ranges
    assert contents(tmp_path / "back") == contents(tmp_path / "here")


def test_plan_reads_headers_alone(store: ObjectStore, source: str, checkpoint: Checkpoint) -> None:
    assert reshard.plan(source, tp_size=2).targets == reshard.plan(checkpoint("llama"), tp_size=2).targets
    spans = [call.bytes for call in store.calls("GET", ".safetensors")]
    assert len(spans) == 3
    assert all(span is not None and span[1] - span[0] <= 16 << 10 for span in spans)


@pytest.fixture
def stored(store: ObjectStore, resharded: Path) -> str:
    """The llama on two ranks, as a folder tp2."""
    return store.put("model/tp2", contents(resharded))


def test_pull_one_rank(store: ObjectStore, stored: str, resharded: Path) -> None:
    folder = reshard.pull(stored, ranks=[1])
    assert contents(folder).keys() == contents(resharded).keys() - {RANK_FILES[0]}
    store.log.clear()
    assert reshard.pull(stored, ranks=[1]) == folder
    assert {call.method for call in store.log} == {"GET"}
    assert all("list-type" in call.query for call in store.log)  # nothing but whether it is as it was


@pytest.mark.fault(16)
def test_a_damaged_object_is_not_kept(store: ObjectStore, stored: str, resharded: Path) -> None:
    data = bytearray(contents(resharded)[RANK_FILES[0]])
    data[-1] ^= 1
    store.put("model/tp2", {RANK_FILES[0]: bytes(data)})
    with pytest.raises(IntegrityError):
        reshard.pull(stored)
    store.put("model/tp2", {RANK_FILES[0]: contents(resharded)[RANK_FILES[0]]})
    assert contents(reshard.pull(stored)) == contents(resharded)


def test_the_folder_for_so_many_ranks(stored: str, cli: Cli) -> None:
    from reshard.places import find_resharded

    assert find_resharded("s3://bucket/model", world_size=2).place == stored
    with pytest.raises(TopologyError, match="in folders: tp2"):
        find_resharded("s3://bucket/model", world_size=4)
    with pytest.raises(TopologyError, match="in folders: tp2"):
        reshard.inspect("s3://bucket/model")


def test_load_under_torchrun(stored: str, checkpoint: Checkpoint) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "runtime", "check"]
    done = subprocess.run(
        [*command, "s3://bucket/model", "--reference", str(checkpoint("llama"))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tokens equal" in done.stdout


def test_a_folder_that_changes_is_not_mixed(store: ObjectStore, source: str, out: Path) -> None:
    _, _, version = locate(source)
    store.put("llama", {"config.json": b"{}"})
    with pytest.raises(RemoteMovedError):
        locate(source, revision=version)


@pytest.mark.fault(15)
def test_a_file_that_changes_while_it_is_fetched(store: ObjectStore, source: str, out: Path) -> None:
    name = "model-00002-of-00003.safetensors"

    def change(call: Call) -> None:
        if call.method == "GET" and call.path.endswith(name) and call.bytes and call.bytes[0] == 0:
            data = bytearray(store.objects("llama")[name])
            data[-1] ^= len(store.log) % 255 + 1
            store.put("llama", {name: bytes(data)})

    store.fault = change
    with pytest.raises((IntegrityError, RemoteMovedError)):
        reshard.convert(source, out, tp_size=2)
    assert not out.exists()


def test_work_on_another_version_is_not_gone_on_with(
    store: ObjectStore, source: str, out: Path, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    """Same names, sizes and headers, but other values."""
    files = contents(checkpoint("llama"))
    last = "model-00003-of-00003.safetensors"
    store.fault = lambda call: (
        error("403 Forbidden", "AccessDenied")
        if call.path.endswith(last) and call.bytes and call.bytes[0] == 0 and len(store.calls("GET", last)) > 1
        else None
    )
    with pytest.raises(NetworkError):
        reshard.convert(source, out, tp_size=2)
    store.fault = None
    first = "model-00001-of-00003.safetensors"
    changed = bytearray(files[first])
    changed[-1] ^= 1
    store.put("llama", {first: bytes(changed)})
    reshard.convert(source, out, tp_size=2)
    (tmp_path / "local").mkdir()
    for name, data in {**files, first: bytes(changed)}.items():
        (tmp_path / "local" / name).write_bytes(data)
    reshard.convert(tmp_path / "local", tmp_path / "expected", tp_size=2)
    assert contents(out) == contents(tmp_path / "expected")


@pytest.mark.fault(18)
@pytest.mark.parametrize("status", ["500 Internal Server Error", "503 Slow Down"])
def test_a_busy_store_is_asked_again(store: ObjectStore, source: str, out: Path, resharded: Path, status: str) -> None:
    failed: set[tuple[Any, ...]] = set()

    def busy(call: Call) -> Any:
        key = (call.method, call.path, call.query, call.bytes)
        if key in failed:
            return None
        failed.add(key)
        return error(status, "SlowDown" if status.startswith("503") else "InternalError")

    store.fault = busy
    reshard.convert(source, out, tp_size=2)
    assert contents(out) == contents(resharded)
    reshard.convert(out, "s3://bucket/out", tp_size=2)
    store.fault = None
    assert store.objects("out") == contents(resharded)


def test_a_broken_connection_is_made_again(store: ObjectStore, source: str, out: Path, resharded: Path) -> None:
    broken: set[Any] = set()

    def drop(call: Call) -> Any:
        if not call.bytes or call in broken:
            return None
        broken.add(call)

        def answer(start_response: Any) -> list[bytes]:
            start, end = call.bytes or (0, 0)
            start_response("206 Partial Content", [("Content-Length", str(end - start)), ("ETag", '"0"')])
            return [b"\0" * ((end - start) // 2)]

        return answer

    store.fault = drop
    reshard.convert(source, out, tp_size=2)
    assert broken
    assert contents(out) == contents(resharded)


@pytest.mark.fault(18)
def test_a_store_that_hangs(store: ObjectStore, source: str, out: Path) -> None:
    def hang(call: Call) -> Any:
        if call.bytes:
            time.sleep(3)
        return None

    store.fault = hang
    began = time.monotonic()
    with pytest.raises(NetworkError):
        reshard.convert(source, out, tp_size=2)
    assert time.monotonic() - began < 40
    assert not out.exists()


def denied(call: Call) -> Any:
    return error("403 Forbidden", "AccessDenied")


@pytest.mark.parametrize(
    ("place", "fault", "code", "mentions", "hint"),
    [
        ("s3://bucket/nothing", None, 3, ["s3://bucket/nothing: nothing is there"], "name"),
        ("s3://no-such-bucket/x", None, 3, ["s3://no-such-bucket/x"], "name"),
        ("s3://bucket/llama", denied, 10, ["may not list", "AccessDenied"], "credentials"),
        ("file:///x", None, 2, ["on this machine"], "/x"),
        ("nosuch://bucket/x", None, 2, ["nosuch"], "Hub id"),
        ("gcs://bucket/x", None, 2, ["gcsfs"], ""),
    ],
)
def test_refusals(
    cli: Cli,
    source: str,
    store: ObjectStore,
    out: Path,
    place: str,
    fault: Any,
    code: int,
    mentions: list[str],
    hint: str,
) -> None:
    store.fault = fault
    for command in (["convert", place, out, "--tp-size", "2"], ["plan", place, "--tp-size", "2"], ["inspect", place]):
        assert_one_error(cli(*command), code, *mentions, hint=hint)
    assert not out.exists()


def test_no_answer(cli: Cli, store: ObjectStore, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert_one_error(cli("convert", "s3://bucket/x", out, "--tp-size", "2"), 10, "could not list", hint="try again")


def test_no_credentials(cli: Cli, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert_one_error(cli("plan", "s3://bucket/x", "--tp-size", "2"), 10, "may not list", hint="credentials")


def test_without_the_package(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    from fsspec.registry import _registry

    monkeypatch.delitem(_registry, "s3", raising=False)
    assert_one_error(cli("plan", "s3://bucket/x", "--tp-size", "2"), 2, "s3fs", hint="pip install 'reshard[s3]'")


@pytest.mark.fault(12)
def test_names_are_not_trusted(store: ObjectStore, source: str, tmp_path: Path, cli: Cli) -> None:
    store.put("llama", {"..\\config.json": b"{}"})
    assert_one_error(cli("plan", source, "--tp-size", "2"), 11, "not a plain file name")


def test_nothing_there_is_replaced(store: ObjectStore, source: str, resharded: Path, tmp_path: Path) -> None:
    place = store.put("out", contents(resharded))
    with pytest.raises(DestinationExistsError):
        reshard.convert(source, place, tp_size=4)
    with pytest.raises(UsageError, match="overwrite"):
        reshard.convert(source, place, tp_size=4, overwrite=True)
    assert store.objects("out") == contents(resharded)
    other = store.put("other", {"notes.txt": b"mine"})
    with pytest.raises(DestinationExistsError, match="something else"):
        reshard.convert(source, other, tp_size=4)
    assert store.objects("other") == {"notes.txt": b"mine"}
    assert not kept(tmp_path)


@pytest.mark.fault(22)
def test_another_run_was_first(store: ObjectStore, source: str, checkpoint: Checkpoint) -> None:
    """With other bytes: nothing of it is replaced, and no manifest says that what there is belongs together."""

    def meanwhile(call: Call) -> None:
        if call.method == "PUT" and call.path.endswith(RANK_FILES[1]) and RANK_FILES[1] not in store.objects("out"):
            store.put("out", {RANK_FILES[1]: b"theirs"})

    store.fault = meanwhile
    with pytest.raises(DestinationExistsError, match="holds another"):
        reshard.convert(source, "s3://bucket/out", tp_size=2)
    assert store.objects("out")[RANK_FILES[1]] == b"theirs"
    assert MANIFEST not in store.objects("out")


@pytest.mark.fault(1)
@pytest.mark.parametrize("at", range(5))
def test_killed_while_sending(
    store: ObjectStore, checkpoint: Checkpoint, resharded: Path, tmp_path: Path, at: int
) -> None:
    """At the request number `at` that sends something. The next run sends what is missing, and only that."""
    sending: list[subprocess.Popen[bytes]] = []

    def kill(call: Call) -> None:
        if call.method == "PUT" and len([c for c in store.log if c.method == "PUT"]) == at + 1:
            sending[0].kill()
            sending[0].wait()

    store.fault = kill
    command = [
        sys.executable,
        "-m",
        "reshard",
        "convert",
        str(checkpoint("llama")),
        "s3://bucket/out",
        "--tp-size",
        "2",
    ]
    sending.append(subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}))
    assert sending[0].wait(120) == -signal.SIGKILL
    store.fault = None
    before = store.objects("out")
    assert kept(tmp_path)
    if MANIFEST in before:  # it was sent already
        assert before == contents(resharded)
        return
    store.log.clear()
    reshard.convert(checkpoint("llama"), "s3://bucket/out", tp_size=2)
    assert store.objects("out") == contents(resharded)
    sent = {call.path.rpartition("/")[2] for call in store.log if call.method == "PUT"}
    assert sent == contents(resharded).keys() - before.keys()
    assert not kept(tmp_path)


def test_a_merge_goes_there_too(store: ObjectStore, resharded: Path, checkpoint: Checkpoint) -> None:
    reshard.merge(resharded, "s3://bucket/llama-again")
    weights = {path.name: path.read_bytes() for path in checkpoint("llama").glob("*.safetensors")}
    there = store.objects("llama-again")
    assert weights.items() <= there.items()
    sent = [call.path for call in store.log if call.method == "PUT"]
    assert sent[-1].endswith("index.json")


def test_whatever_fsspec_opens(checkpoint: Checkpoint, resharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    system = MemoryFileSystem()
    for name, data in contents(checkpoint("llama")).items():
        system.pipe_file(f"/llama/{name}", data)
    reshard.convert("memory://llama", "memory://out", tp_size=2)
    found = {info["name"].rpartition("/")[2]: system.cat_file(info["name"]) for info in system.ls("/out", detail=True)}
    assert found == contents(resharded)


def test_bad_input_reaches_the_user(cli: Cli, store: ObjectStore, out: Path) -> None:
    store.put("broken", {"config.json": b"{", "model.safetensors": b"\xff" * 9})
    assert cli("convert", "s3://bucket/broken", out, "--tp-size", "2").code == 3
    with pytest.raises(BadInputError):
        reshard.plan("s3://bucket/broken", tp_size=2)

"""An object store that fails, changes, or has wrong contents: one line says so, and nothing is left half-done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import warm_commands
from cli_tools import RANK_FILES, Checkpoint, Cli, assert_one_error
from object_store import Call, ObjectStore, contents, error, kept

import reshard
from reshard.errors import (
    BadInputError,
    DestinationExistsError,
    IntegrityError,
    NetworkError,
    RemoteMovedError,
    UsageError,
)
from reshard.storage.locate import locate
from reshard.storage.stores import PROBE_NAME

MANIFEST = "reshard.json"


@pytest.mark.fault(16)
def test_a_damaged_object_is_not_kept(store: ObjectStore, stored: str, resharded: Path) -> None:
    data = bytearray(contents(resharded)[RANK_FILES[0]])
    data[-1] ^= 1
    store.put("model/tp2", {RANK_FILES[0]: bytes(data)})
    with pytest.raises(IntegrityError):
        reshard.pull(stored)
    store.put("model/tp2", {RANK_FILES[0]: contents(resharded)[RANK_FILES[0]]})
    assert contents(reshard.pull(stored)) == contents(resharded)


def test_a_folder_that_changes_is_not_mixed(store: ObjectStore, stored_source: str, out: Path) -> None:
    _, _, version = locate(stored_source)
    store.put("llama", {"config.json": b"{}"})
    with pytest.raises(RemoteMovedError):
        locate(stored_source, revision=version)


@pytest.mark.fault(15)
def test_small_files_and_weights_are_of_one_version(store: ObjectStore, stored_source: str, out: Path) -> None:
    """The weights change after the small files are fetched and before headers are read."""
    name, changed = "model-00001-of-00003.safetensors", []

    def change(call: Call) -> None:
        if not changed and call.method == "GET" and call.path.endswith("config.json"):
            changed.append(name)
            store.put("llama", {name: store.objects("llama")[name] + b" "})

    store.fault = change
    with pytest.raises((IntegrityError, RemoteMovedError)):
        reshard.convert(stored_source, out, tp_size=2)
    assert changed
    assert not out.exists()


@pytest.mark.fault(15)
def test_a_file_that_changes_while_it_is_fetched(store: ObjectStore, stored_source: str, out: Path) -> None:
    name = "model-00002-of-00003.safetensors"

    def change(call: Call) -> None:
        if call.method == "GET" and call.path.endswith(name) and call.bytes and call.bytes[0] == 0:
            data = bytearray(store.objects("llama")[name])
            data[-1] ^= len(store.log) % 255 + 1
            store.put("llama", {name: bytes(data)})

    store.fault = change
    with pytest.raises((IntegrityError, RemoteMovedError)):
        reshard.convert(stored_source, out, tp_size=2)
    assert not out.exists()


def test_work_on_another_version_is_not_gone_on_with(
    store: ObjectStore, stored_source: str, out: Path, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    """The new version has the same names, sizes and headers, but other values."""
    files = contents(checkpoint("llama"))
    last = "model-00003-of-00003.safetensors"
    store.fault = lambda call: (
        error("403 Forbidden", "AccessDenied")
        if call.path.endswith(last) and call.bytes and call.bytes[0] == 0 and len(store.calls("GET", last)) > 1
        else None
    )
    with pytest.raises(NetworkError):
        reshard.convert(stored_source, out, tp_size=2)
    store.fault = None
    first = "model-00001-of-00003.safetensors"
    changed = bytearray(files[first])
    changed[-1] ^= 1
    store.put("llama", {first: bytes(changed)})
    reshard.convert(stored_source, out, tp_size=2)
    (tmp_path / "local").mkdir()
    for name, data in {**files, first: bytes(changed)}.items():
        (tmp_path / "local" / name).write_bytes(data)
    reshard.convert(tmp_path / "local", tmp_path / "expected", tp_size=2)
    assert contents(out) == contents(tmp_path / "expected")


@pytest.mark.fault(18)
@pytest.mark.parametrize("status", ["500 Internal Server Error", "503 Slow Down"])
def test_a_busy_store_is_asked_again(
    store: ObjectStore, stored_source: str, out: Path, resharded: Path, status: str
) -> None:
    failed: set[tuple[Any, ...]] = set()

    def busy(call: Call) -> Any:
        key = (call.method, call.path, call.query, call.bytes)
        if key in failed:
            return None
        failed.add(key)
        return error(status, "SlowDown" if status.startswith("503") else "InternalError")

    store.fault = busy
    reshard.convert(stored_source, out, tp_size=2)
    assert contents(out) == contents(resharded)
    reshard.convert(out, "s3://bucket/out", tp_size=2)
    store.fault = None
    assert store.objects("out") == contents(resharded)


def test_a_broken_connection_is_made_again(store: ObjectStore, stored_source: str, out: Path, resharded: Path) -> None:
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
    reshard.convert(stored_source, out, tp_size=2)
    assert broken
    assert contents(out) == contents(resharded)


@pytest.mark.fault(18)
def test_a_store_that_hangs(store: ObjectStore, stored_source: str, out: Path) -> None:
    def hang(call: Call) -> Any:
        if call.bytes:
            time.sleep(3)
        return None

    store.fault = hang
    began = time.monotonic()
    with pytest.raises(NetworkError):
        reshard.convert(stored_source, out, tp_size=2)
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
        ("gcs://bucket/x", None, 2, ["gcsfs"], "pip install gcsfs"),
        ("s3://bucket/a::b", None, 2, ["s3://bucket/a::b: chained URLs"], "folder"),
        ("simplecache::s3://bucket/x", None, 2, ["chained URLs"], "folder"),
    ],
)
def test_refusals(
    cli: Cli,
    stored_source: str,
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


def test_a_store_that_takes_nothing(
    store: ObjectStore, source: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes before any work, and nothing of it stays."""
    store.fault = lambda call: denied(call) if call.method == "PUT" else None
    monkeypatch.setattr(reshard.operations.convert.work, "open_origin", None)
    assert_one_error(cli("convert", source, "s3://bucket/out", "-tp", 2), 10, "may not write", hint="credentials")
    assert store.objects("out") == {}
    assert not kept(tmp_path)


def test_a_store_that_removes_nothing(store: ObjectStore, checkpoint: Checkpoint, resharded: Path, out: Path) -> None:
    """The object that tries the store stays, and does no harm."""
    store.fault = lambda call: denied(call) if call.method == "DELETE" else None
    for _ in range(2):
        with pytest.raises(BadInputError, match="no such folder"):
            reshard.convert(out, "s3://bucket/out", tp_size=2)
        assert store.objects("out") == {PROBE_NAME: b"\n"}
    reshard.convert(checkpoint("llama"), "s3://bucket/out", tp_size=2)
    assert store.objects("out") == {PROBE_NAME: b"\n", **contents(resharded)}
    reshard.convert("s3://bucket/out", out, tp_size=2)
    assert contents(out) == contents(resharded)


def test_what_a_killed_run_has_tried_out(store: ObjectStore, checkpoint: Checkpoint, resharded: Path) -> None:
    store.put("out", {PROBE_NAME: b"\n"})
    reshard.convert(checkpoint("llama"), "s3://bucket/out", tp_size=2)
    assert store.objects("out") == contents(resharded)


def test_no_room_in_the_cache(
    store: ObjectStore, stored_source: str, source: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert_one_error(cli("plan", stored_source, "-tp", 2), 5, "Not a directory")
    assert_one_error(cli("convert", source, "s3://bucket/out", "-tp", 2), 5, "Not a directory")


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
def test_names_are_not_trusted(store: ObjectStore, stored_source: str, tmp_path: Path, cli: Cli) -> None:
    store.put("llama", {"..\\config.json": b"{}"})
    assert "left behind: ..\\config.json (" in cli("plan", stored_source, "--tp-size", "2").out
    store.put("llama", {"..\\x.index.json": b"{}"})
    assert_one_error(cli("plan", stored_source, "--tp-size", "2"), 11, "not a plain file name")


def test_nothing_there_is_replaced(store: ObjectStore, stored_source: str, resharded: Path, tmp_path: Path) -> None:
    place = store.put("out", contents(resharded))
    with pytest.raises(DestinationExistsError):
        reshard.convert(stored_source, place, tp_size=4)
    with pytest.raises(UsageError, match="overwrite"):
        reshard.convert(stored_source, place, tp_size=4, overwrite=True)
    assert store.objects("out") == contents(resharded)
    other = store.put("other", {"notes.txt": b"mine"})
    with pytest.raises(DestinationExistsError, match="something else"):
        reshard.convert(stored_source, other, tp_size=4)
    assert store.objects("other") == {"notes.txt": b"mine"}
    assert not kept(tmp_path)


@pytest.mark.fault(22)
def test_another_run_was_first(store: ObjectStore, stored_source: str, checkpoint: Checkpoint) -> None:
    """Another run's different bytes are not replaced, and no manifest says that the files belong together."""

    def meanwhile(call: Call) -> None:
        if call.method == "PUT" and call.path.endswith(RANK_FILES[1]) and RANK_FILES[1] not in store.objects("out"):
            store.put("out", {RANK_FILES[1]: b"theirs"})

    store.fault = meanwhile
    with pytest.raises(DestinationExistsError, match="holds another"):
        reshard.convert(stored_source, "s3://bucket/out", tp_size=2)
    assert store.objects("out")[RANK_FILES[1]] == b"theirs"
    assert MANIFEST not in store.objects("out")


def sent_to(store: ObjectStore) -> set[str]:
    return {call.path.rpartition("/")[2] for call in store.log if call.method == "PUT"}


@pytest.mark.fault(1)
@pytest.mark.parametrize("at", range(6))
def test_killed_while_sending(
    store: ObjectStore, checkpoint: Checkpoint, resharded: Path, tmp_path: Path, at: int
) -> None:
    """The kill comes at sending request number `at`; request 0 tries the store before any work. The next run sends only
    what is missing."""
    sending: list[subprocess.Popen[bytes]] = []

    def kill(call: Call) -> None:
        if call.method == "PUT" and len([c for c in store.log if c.method == "PUT"]) == at + 1:
            os.kill(warm_commands.own_id(sending[0]), signal.SIGKILL)
            sending[0].wait()

    store.fault = kill
    command = [
        warm_commands.python(),
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
    assert bool(kept(tmp_path)) == (at > 0)
    if MANIFEST in before:  # the manifest was sent already
        assert before == contents(resharded)
        return
    under_way = sent_to(store)  # requests made before the kill may take effect a moment later
    store.log.clear()
    reshard.convert(checkpoint("llama"), "s3://bucket/out", tp_size=2)
    assert store.objects("out") == contents(resharded)
    missing = contents(resharded).keys() - before.keys()
    assert missing - under_way <= sent_to(store) - {PROBE_NAME} <= missing
    assert not kept(tmp_path)


def test_bad_input_reaches_the_user(cli: Cli, store: ObjectStore, out: Path) -> None:
    store.put("broken", {"config.json": b"{", "model.safetensors": b"\xff" * 9})
    assert cli("convert", "s3://bucket/broken", out, "--tp-size", "2").code == 3
    with pytest.raises(BadInputError):
        reshard.plan("s3://bucket/broken", tp_size=2)


@pytest.mark.fault(27)
def test_a_password_in_a_url_is_not_told(cli: Cli) -> None:
    result = cli("plan", "nosuch://somebody:secret@host/x", "--tp-size", "2")
    assert_one_error(result, 2, "nosuch://host/x")
    assert "secret" not in result.out + result.err

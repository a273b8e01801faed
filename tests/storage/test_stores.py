"""Checkpoints and resharded folders in an object store, against moto's S3 server: same bytes, and nothing half-done."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_commands
from cli_tools import RANK_FILES, Checkpoint, Cli
from object_store import ObjectStore, contents, kept
from safetensors.torch import save_file

import reshard
from reshard.errors import TopologyError
from reshard.storage import stores
from reshard.storage.stores import PROBE_NAME

MANIFEST = "reshard.json"


def test_from_a_store(
    store: ObjectStore, stored_source: str, resharded: Path, checkpoint: Checkpoint, out: Path
) -> None:
    """The bytes equal those from a folder, manifest included; weights are requested once, except for headers."""
    reshard.convert(stored_source, out, tp_size=2)
    assert contents(out) == contents(resharded)
    weights = list(checkpoint("llama").glob("*.safetensors"))
    asked = sum(call.bytes[1] - call.bytes[0] for call in store.calls("GET", ".safetensors") if call.bytes)
    size = sum(path.stat().st_size for path in weights)
    assert size < asked <= size + len(weights) * (16 << 10)
    assert [path.name for path in out.parent.iterdir() if path.name.startswith("out")] == ["out"]


def test_files_are_removed_when_they_are_cut(
    stored_source: str, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most, get = 0, stores.Store.get

    def watched(self: Any, name: str, folder: Path | None, *given_up: Any) -> Path:
        nonlocal most
        found = get(self, name, folder, *given_up)
        most = max(most, len(list(tmp_path.glob("out.part-fetched-*/model-*.safetensors"))))
        return found

    monkeypatch.setattr(stores.Store, "get", watched)
    reshard.convert(stored_source, out, tp_size=2)
    assert 1 <= most <= 2


def test_keep_cache(store: ObjectStore, stored_source: str, out: Path, tmp_path: Path) -> None:
    reshard.convert(stored_source, out, tp_size=2, keep_cache=True)
    store.log.clear()
    reshard.convert(stored_source, tmp_path / "again", tp_size=2)
    assert not store.calls("GET", ".safetensors")
    assert contents(out) == contents(tmp_path / "again")


def test_to_a_store(store: ObjectStore, checkpoint: Checkpoint, resharded: Path, tmp_path: Path) -> None:
    """The bytes are the same; the manifest is sent last, and nothing stays on this machine."""
    reshard.convert(checkpoint("llama"), "s3://bucket/out", tp_size=2)
    assert store.objects("out") == contents(resharded)
    sent = [call.path for call in store.log if call.method in ("PUT", "POST")]
    assert sent.pop(0) == f"bucket/out/{PROBE_NAME}"
    assert len(sent) == len(contents(resharded))
    assert sent[-1] == f"bucket/out/{MANIFEST}"
    assert not kept(tmp_path)


def test_from_store_to_store_and_on(store: ObjectStore, stored_source: str, out: Path, checkpoint: Checkpoint) -> None:
    reshard.convert(stored_source, "s3://bucket/tp4", tp_size=4)
    reshard.convert("s3://bucket/tp4", "s3://bucket/tp2", tp_size=2)
    reshard.convert(checkpoint("llama"), out, tp_size=2)
    assert store.objects("tp2") == contents(out)
    assert reshard.inspect("s3://bucket/tp2") == reshard.inspect(out)
    assert reshard.verify(out, against=stored_source).elements


def test_large_files_are_sent_in_parts(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    """Parts have 5 MiB, S3's least; nobody sees a file before its last part has arrived."""
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


def test_plan_reads_headers_alone(store: ObjectStore, stored_source: str, checkpoint: Checkpoint) -> None:
    assert reshard.plan(stored_source, tp_size=2).targets == reshard.plan(checkpoint("llama"), tp_size=2).targets
    spans = [call.bytes for call in store.calls("GET", ".safetensors")]
    assert len(spans) == 3
    assert all(span is not None and span[1] - span[0] <= 16 << 10 for span in spans)


def test_pull_one_rank(store: ObjectStore, stored: str, resharded: Path, tmp_path: Path) -> None:
    folder = reshard.pull(stored, ranks=[1])
    assert contents(folder).keys() == contents(resharded).keys() - {RANK_FILES[0]}
    store.log.clear()
    assert reshard.pull(stored, ranks=[1]) == folder
    assert {call.method for call in store.log} == {"GET"}
    assert all("list-type" in call.query for call in store.log)  # only lists, to see whether anything changed
    assert reshard.pull(stored, to=tmp_path / "here") == tmp_path / "here"
    assert contents(tmp_path / "here") == contents(resharded)


def test_the_folder_for_so_many_ranks(stored: str, cli: Cli) -> None:
    from reshard.storage.locate import find_resharded

    assert find_resharded("s3://bucket/model", world_size=2).place == stored
    with pytest.raises(TopologyError, match="in folders: tp2"):
        find_resharded("s3://bucket/model", world_size=4)
    with pytest.raises(TopologyError, match="in folders: tp2"):
        reshard.inspect("s3://bucket/model")


def test_load_under_torchrun(stored: str, checkpoint: Checkpoint) -> None:
    command = [warm_commands.python(), "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "runtime", "check"]
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


def test_a_merge_of_there_goes_there_too(store: ObjectStore, stored: str, checkpoint: Checkpoint) -> None:
    reshard.merge("s3://bucket/model/tp2", "s3://bucket/llama-again")
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

"""More files than a process may open: any number of source files and ranks, with 64 descriptors."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import warm_commands
from cli_tools import Checkpoint
from executor_tools import load, make_source, simple_job, taken_whole
from fake_hub import FakeHub
from object_store import ObjectStore
from object_store import contents as objects

import reshard
from reshard.execution import executor
from reshard.execution.executor import Inputs, write_files
from reshard.files.mapped import MappedFile
from reshard.resharded.layout import file_layout
from reshard.storage import outputs
from reshard.storage.outputs import OutputFiles

LIMIT = 64
RANKS, FEWER = 96, 48
LAYERS = 8
FILES = 9 * LAYERS + 3  # each tensor has a file of its own
HEADS = {
    "hidden_size": RANKS,
    "num_attention_heads": RANKS,
    "num_key_value_heads": RANKS,
    "head_dim": 2,
    "intermediate_size": RANKS,
    "vocab_size": RANKS,
}
COMMAND = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, {LIMIT}))
from reshard.cli.main import entry
entry()
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many") / "source"
    pico.save("llama", folder, shard_bytes=1, num_hidden_layers=LAYERS, **HEADS)
    assert len(list(folder.glob("*.safetensors"))) == FILES > LIMIT
    return folder


@pytest.fixture(scope="module")
def made(source: Path) -> Path:
    """The source on RANKS ranks, made without a limit on descriptors."""
    reshard.convert(source, source.with_name("made"), tp_size=RANKS)
    return source.with_name("made")


def run(*arguments: object) -> None:
    command = [warm_commands.python(), "-c", COMMAND, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.fault(30)
def test_convert_and_verify(source: Path, made: Path, tmp_path: Path) -> None:
    run("convert", source, tmp_path / "out", "--tp-size", RANKS)
    assert contents(tmp_path / "out") == contents(made)
    run("verify", tmp_path / "out", "--against", source)


@pytest.mark.fault(30)
def test_merge(source: Path, made: Path, tmp_path: Path) -> None:
    run("merge", made, tmp_path / "merged")
    merged = contents(tmp_path / "merged")
    assert {name: data for name, data in merged.items() if name.endswith(".safetensors")} == {
        path.name: path.read_bytes() for path in source.glob("*.safetensors")
    }


@pytest.mark.fault(30)
def test_from_many_ranks_to_many(source: Path, made: Path, tmp_path: Path) -> None:
    run("convert", made, tmp_path / "out", "--tp-size", FEWER)
    reshard.convert(source, tmp_path / "straight", tp_size=FEWER)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.fault(30)
@pytest.mark.parametrize("ranks", [0, RANKS], ids=["source files", "rank files"])
def test_straight_from_the_hub(
    ranks: int, source: Path, made: Path, hub: FakeHub, python: Callable[..., Any], tmp_path: Path
) -> None:
    hub.create("org/model", contents(made if ranks else source))
    done = python("-c", COMMAND, "convert", "org/model", tmp_path / "out", "--tp-size", FEWER)
    assert done.returncode == 0, done.stderr
    reshard.verify(tmp_path / "out", against=source)


@pytest.mark.fault(30)
def test_from_store_to_store(source: Path, store: ObjectStore, tmp_path: Path) -> None:
    url = store.put("many", objects(source))
    out = f"{url.rpartition('/')[0]}/out"
    run("convert", url, out, "--tp-size", FEWER)
    run("merge", out, tmp_path / "merged")
    assert all(
        path.read_bytes() == (tmp_path / "merged" / path.name).read_bytes() for path in source.glob("*.safetensors")
    )


# --- where descriptors went ---


def opened_in(folder: Path) -> int:
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # another thread closed it meanwhile
            found += Path(os.readlink(f"/proc/self/fd/{fd}")).parent == folder
    return found


def mappings_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def test_a_source_file_is_mapped_while_it_is_needed(tmp_path: Path) -> None:
    """The system limits mappings too (vm.max_map_count)."""
    tensors = [{f"t{i}": torch.full((8,), i)} for i in range(40)]
    source = make_source(tmp_path / "source", *tensors)
    most: list[int] = []
    layout = file_layout("out.safetensors", taken_whole(source))
    write_files(
        tmp_path,
        [layout],
        Inputs(source),
        workers=1,
        progress=lambda _: most.append(mappings_of(tmp_path / "source")),
    )
    assert len(most) == 40
    assert max(most) <= 2
    assert mappings_of(tmp_path / "source") == 0


def test_a_mapping_holds_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 9999)
    held = [MappedFile(tmp_path / "file", size=9999) for _ in range(50)]
    assert (opened_in(tmp_path), mappings_of(tmp_path)) == (0, 50)
    view = torch.frombuffer(held[0].data, dtype=torch.uint8)
    del held
    assert bytes(view.numpy()) == b"x" * 9999  # the view keeps the mapping
    assert mappings_of(tmp_path) == 1
    del view
    assert mappings_of(tmp_path) == 0


@pytest.mark.parametrize("workers", [1, 9])
@pytest.mark.parametrize("limit", [2, 8, 1000])
def test_so_many_outputs_are_open_at_a_time(
    limit: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "descriptors", lambda: limit)
    source, tensors = simple_job(tmp_path)
    layouts = [file_layout(f"{i}.safetensors", tensors) for i in range(20)]
    most: list[int] = []

    class Counted(OutputFiles):
        def _descriptor(self, index: int) -> int:
            fd = super()._descriptor(index)
            most.append(opened_in(tmp_path))  # under the lock: no thread opens or closes a file during the count
            return fd

    monkeypatch.setattr(executor, "OutputFiles", Counted)
    write_files(tmp_path, layouts, Inputs(source), workers=workers)
    assert max(most) == min(20, limit // 2)
    assert opened_in(tmp_path) == 0
    expected = load(source.files[0].path)
    for layout in layouts:
        found = load(tmp_path / layout.name)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_one_that_is_in_use_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "descriptors", lambda: 4)
    _, tensors = simple_job(tmp_path, count=1)
    layouts = [file_layout(f"{i}.safetensors", tensors) for i in range(6)]
    with OutputFiles(tmp_path, layouts, anew=True) as files, files.opened(0) as used:
        for index in range(1, 6):
            with files.opened(index) as fd:
                assert os.path.samestat(os.fstat(fd), os.stat(tmp_path / f"{index}.safetensors"))
        assert os.path.samestat(os.fstat(used), os.stat(tmp_path / "0.safetensors"))


def test_many_threads_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "descriptors", lambda: 8)
    _, tensors = simple_job(tmp_path, count=1)
    layouts = [file_layout(f"{i}.safetensors", tensors) for i in range(30)]
    wrong: list[int] = []

    def work(files: OutputFiles, seed: int) -> None:
        for step in range(300):
            index = (seed * 7 + step * 11) % 30
            with files.opened(index) as fd:
                if not os.path.samestat(os.fstat(fd), os.stat(tmp_path / f"{index}.safetensors")):
                    wrong.append(index)

    with OutputFiles(tmp_path, layouts, anew=True) as files:
        threads = [threading.Thread(target=work, args=(files, seed)) for seed in range(files.most)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_saved_model_of_many_files(checkpoint: Checkpoint, tmp_path: Path) -> None:
    reshard.convert(checkpoint("llama"), tmp_path / "out", tp_size=1)
    code = f"""
import os, resource, runtime
model = runtime.load({str(tmp_path / "out")!r})
limit = len(os.listdir("/proc/self/fd")) + 16
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
model.save_pretrained({str(tmp_path / "saved")!r}, max_shard_size=1)
"""
    done = subprocess.run(
        [warm_commands.python(), "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == 21

"""Conversion straight from the Hub: each file is here only while it is cut, and fetched once, despite interruptions."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import Checkpoint
from fake_hub import FakeHub, faults, xet
from kill_tools import interrupted_after
from safetensors.torch import load_file, save_file

import reshard
import reshard.operations.convert.work
import reshard.operations.plan
from reshard.errors import BadInputError, IntegrityError, NetworkError, PolicyError, StorageError, TopologyError
from reshard.storage.prefetch import AHEAD
from reshard.storage.remote import Remote

WEIGHTS = re.compile(r"GET /org/model/resolve/[^/]+/(model-.*\.safetensors)")


@pytest.fixture
def published(here: FakeHub, checkpoint: Checkpoint) -> FakeHub:
    """The Hub of this process, with a llama in three files."""
    here.create("org/model", contents(checkpoint("llama")))
    return here


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(out: Path, local: Path, place: str = "org/model") -> None:
    """Check that `out` is `local`, but for the source that the manifest names."""
    found, expected = contents(out), contents(local)
    assert found.pop("reshard.json") != expected.pop("reshard.json")
    assert found == expected
    commit = reshard.inspect(out).commit
    assert commit is not None
    assert reshard.inspect(out) == dataclasses.replace(reshard.inspect(local), repo_id=place, commit=commit)
    assert not list(out.parent.glob(f"{out.name}.*"))


@pytest.fixture
def local(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    reshard.convert(checkpoint("llama"), tmp_path / "local", tp_size=2)
    return tmp_path / "local"


def fetched(hub: FakeHub, sizes: dict[str, int]) -> tuple[dict[str, int], int]:
    """Return the requested bytes of weights: for each file in full or its rest, and in ranges for headers."""
    bodies: dict[str, int] = dict.fromkeys(sizes, 0)
    headers = 0
    for request in hub.requests:
        match = WEIGHTS.fullmatch(str(request))
        if match is None:
            continue
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "bytes=0-"))
        assert asked is not None
        if asked[2]:
            headers += int(asked[2]) + 1 - int(asked[1])
        else:
            bodies[match[1]] += sizes[match[1]] - int(asked[1])
    return bodies, headers


def sizes_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


def cached(home: Path) -> list[str]:
    return sorted(path.name for path in home.rglob("snapshots/*/*.safetensors"))


def test_each_file_is_fetched_once_and_stays_no_longer_than_needed(
    published: FakeHub, checkpoint: Checkpoint, home: Path, local: Path, tmp_path: Path
) -> None:
    out, most = tmp_path / "out", 0

    class Watching:
        def __enter__(self) -> Callable[[int], None]:
            return self.look

        def __exit__(self, *_: object) -> None:
            pass

        def look(self, _: int) -> None:
            nonlocal most
            most = max(most, len(list(tmp_path.glob("out.part-fetched-*/*.safetensors"))))

    reshard.convert("org/model", out, tp_size=2, progress=lambda *_: Watching())  # type: ignore[arg-type, return-value]
    assert_same(out, local)
    sizes = sizes_of(checkpoint("llama"))
    bodies, headers = fetched(published, sizes)
    assert bodies == sizes
    assert headers <= 16 * 1024 * len(sizes)
    assert 1 <= most <= 2
    assert cached(home) == []


def test_kept_in_the_cache(
    published: FakeHub, home: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reshard.convert("org/model", tmp_path / "out", tp_size=2, keep_cache=True)
    assert_same(tmp_path / "out", local)
    assert cached(home) == sorted(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    published.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reshard.convert("org/model", tmp_path / "again", tp_size=2)
    assert_same(tmp_path / "again", local)
    assert published.requests == []
    assert len(cached(home)) == 3


def test_what_the_cache_has_is_not_fetched(
    published: FakeHub, checkpoint: Checkpoint, home: Path, local: Path, tmp_path: Path
) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download("org/model", "model-00002-of-00003.safetensors")
    published.requests.clear()
    reshard.convert("org/model", tmp_path / "out", tp_size=2)
    assert_same(tmp_path / "out", local)
    bodies, _ = fetched(published, sizes_of(checkpoint("llama")))
    assert bodies["model-00002-of-00003.safetensors"] == 0
    assert cached(home) == ["model-00002-of-00003.safetensors"]


@pytest.mark.fault(3)
@pytest.mark.parametrize("after", [1, 9, 20, 40])
def test_an_interrupted_conversion_fetches_only_what_is_missing(
    after: int, published: FakeHub, checkpoint: Checkpoint, local: Path, tmp_path: Path
) -> None:
    with interrupted_after(after):
        reshard.convert("org/model", tmp_path / "out", tp_size=2, workers=1)
    sizes = sizes_of(checkpoint("llama"))
    before, _ = fetched(published, sizes)
    whole = {path.name for path in tmp_path.glob("out.part-fetched-*/*.safetensors")}
    published.requests.clear()
    (tmp_path / f"out.part-fetched-{'0' * 40}").mkdir()  # the fetched files of an earlier commit
    reshard.convert("org/model", tmp_path / "out", tp_size=2)
    assert_same(tmp_path / "out", local)
    bodies, _ = fetched(published, sizes)
    again = {name for name in sizes if before[name] and bodies[name]}
    assert not whole & {name for name in bodies if bodies[name]}
    assert len(again) <= AHEAD  # the files that were being fetched
    assert all(before[name] or bodies[name] for name in sizes)


@pytest.mark.fault(18)
def test_a_broken_connection_goes_on_where_it_was(
    published: FakeHub, checkpoint: Checkpoint, local: Path, tmp_path: Path
) -> None:
    name = "model-00002-of-00003.safetensors"
    published.fail(f"GET .*{name}", faults.stall(0, seconds=0))  # the header's request
    published.fail(f"GET .*{name}", faults.drop(20_000), times=1)
    reshard.convert("org/model", tmp_path / "out", tp_size=2)
    assert_same(tmp_path / "out", local)
    assert published.faults_left == 0


@pytest.mark.fault(18)
def test_a_hub_that_has_gone_is_waited_for_no_longer(
    published: FakeHub, checkpoint: Checkpoint, local: Path, tmp_path: Path
) -> None:
    name = "model-00002-of-00003.safetensors"
    published.fail(f"GET /org/model/resolve.*{name}", lambda handler, answer: answer())  # the header's request
    published.fail(f"(GET|HEAD) /org/model/resolve.*{name}", faults.status(503), times=100)
    with pytest.raises(NetworkError) as failed:
        reshard.convert("org/model", tmp_path / "out", tp_size=2)
    assert "kept" in str(failed.value.hint)
    assert not (tmp_path / "out").exists()
    published.recover()
    published.requests.clear()
    reshard.convert("org/model", tmp_path / "out", tp_size=2)
    assert_same(tmp_path / "out", local)
    bodies, _ = fetched(published, sizes_of(checkpoint("llama")))
    assert bodies["model-00001-of-00003.safetensors"] == 0  # it was cut before


@pytest.mark.fault(16)
def test_wrong_bytes_are_not_cut(published: FakeHub, checkpoint: Checkpoint, local: Path, tmp_path: Path) -> None:
    name = "model-00002-of-00003.safetensors"
    published.fail(f"GET /org/model/resolve.*{name}", lambda handler, answer: answer())  # the header's request
    published.fail(f"GET /org/model/resolve.*{name}", faults.corrupt(), times=1)
    with pytest.raises(IntegrityError, match=f"org/model: {name} did not arrive intact"):
        reshard.convert("org/model", tmp_path / "out", tp_size=2, workers=1)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob(name))
    published.requests.clear()
    reshard.convert("org/model", tmp_path / "out", tp_size=2)
    assert_same(tmp_path / "out", local)
    bodies, _ = fetched(published, sizes_of(checkpoint("llama")))
    assert bodies["model-00001-of-00003.safetensors"] == 0  # its results were good


def test_tied_tensors_are_compared_as_they_arrive(here: FakeHub, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """One is in the first file and the other in the last: both files are here together, and are fetched once."""
    source = Path(shutil.copytree(checkpoint("llama", tie_word_embeddings=True), tmp_path / "source"))
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = content["weight_map"]["model.embed_tokens.weight"]
    weight = load_file(source / first)["model.embed_tokens.weight"]
    for name, same in (("equal", True), ("other", False)):
        save_file(
            {"lm_head.weight": weight if same else weight + 1}, source / "model-zlast.safetensors", {"format": "pt"}
        )
        content["weight_map"]["lm_head.weight"] = "model-zlast.safetensors"
        index.write_text(json.dumps(content))
        here.create("org/model", contents(source))
        here.requests.clear()
        reshard.convert(source, tmp_path / f"local-{name}", tp_size=2)
        made = reshard.convert("org/model", tmp_path / name, tp_size=2)
        assert_same(tmp_path / name, tmp_path / f"local-{name}")
        assert bool(made.duplicates) is same
        sizes = sizes_of(source)
        assert fetched(here, sizes)[0] == sizes


def test_a_plan_reads_headers_alone(published: FakeHub, checkpoint: Checkpoint, home: Path) -> None:
    planned = reshard.plan("org/model", tp_size=2)
    assert planned.targets == reshard.plan(checkpoint("llama"), tp_size=2).targets
    bodies, headers = fetched(published, sizes_of(checkpoint("llama")))
    assert not sum(bodies.values())
    assert headers <= 16 * 1024 * 3
    assert cached(home) == []


def test_a_long_header_takes_two_ranges(here: FakeHub, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint("llama"), tmp_path / "source"))
    last = sorted(source.glob("*.safetensors"))[-1]
    more = {f"unused.{i}": torch.zeros(1) for i in range(400)}
    save_file({**load_file(last), **more}, last, {"format": "pt"})
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(more, last.name)
    index.write_text(json.dumps(content))
    here.create("org/model", contents(source))
    assert reshard.plan("org/model", tp_size=2).targets == reshard.plan(source, tp_size=2).targets
    length = int.from_bytes(last.read_bytes()[:8], "little")
    assert length > 16 * 1024
    _, headers = fetched(here, sizes_of(source))
    assert headers == sum(min(size, 16 * 1024) for size in sizes_of(source).values()) + 8 + length - 16 * 1024


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    "fault", [faults.ignore_range(), faults.drop(100), faults.status(503), faults.status(429, retry_after=0)]
)
def test_headers_come_all_the_same(fault: Any, published: FakeHub, checkpoint: Checkpoint) -> None:
    published.fail("GET /org/model/resolve.*model-00002", fault)
    assert reshard.plan("org/model", tp_size=2).targets == reshard.plan(checkpoint("llama"), tp_size=2).targets
    assert published.faults_left == 0


def test_a_part_of_a_repo(here: FakeHub, checkpoint: Checkpoint, local: Path, tmp_path: Path) -> None:
    here.create("org/model", {f"deep/down/{name}": data for name, data in contents(checkpoint("llama")).items()})
    reshard.convert("org/model/deep/down", tmp_path / "out", tp_size=2)
    assert_same(tmp_path / "out", local, place="org/model/deep/down")


@pytest.mark.fault(12)
def test_an_index_that_leads_elsewhere(here: FakeHub, checkpoint: Checkpoint) -> None:
    files = contents(checkpoint("llama"))
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"]["lm_head.weight"] = "../other/model.safetensors"
    here.create("org/model", {**files, "model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(PolicyError, match="not a plain file name"):
        reshard.plan("org/model", tp_size=2)
    index["weight_map"]["lm_head.weight"] = "gone.safetensors"
    here.create("org/model", {**files, "model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(BadInputError, match=r"org/model: has no gone\.safetensors"):
        reshard.plan("org/model", tp_size=2)


def test_a_header_of_nothing(here: FakeHub, checkpoint: Checkpoint) -> None:
    here.create("org/model", {**contents(checkpoint("llama")), "model-00002-of-00003.safetensors": b""})
    with pytest.raises(BadInputError, match="model-00002"):
        reshard.plan("org/model", tp_size=2)


@pytest.mark.fault(5)
def test_a_disk_that_is_full_of_what_arrives(published: FakeHub, local: Path, tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.hf_hub_download", full)
        with pytest.raises(StorageError, match="org/model: could not be kept here: No space left"):
            reshard.convert("org/model", tmp_path / "out", tp_size=2)
    reshard.convert("org/model", tmp_path / "out", tp_size=2)
    assert_same(tmp_path / "out", local)


def test_a_file_that_changes_its_size_is_refused(published: FakeHub, tmp_path: Path) -> None:
    """The Hub gives no digest."""
    remote_fetch = Remote.fetch

    def fetch(self: Remote, name: str, *arguments: Any, **options: Any) -> Path:
        source = dataclasses.replace(
            self.source, files=tuple(dataclasses.replace(file, size=file.size + 1) for file in self.source.files)
        )
        return remote_fetch(dataclasses.replace(self, source=source, digests={}), name, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Remote, "fetch", fetch)
        with pytest.raises(IntegrityError, match="did not arrive intact"):
            reshard.convert("org/model", tmp_path / "out", tp_size=2)


def test_nothing_stays_of_what_was_fetched_for_a_plan_that_cannot_be(
    published: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub is slow, and running downloads are broken off."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    published.rate = 10_000
    with pytest.raises(TopologyError):
        reshard.convert("org/model", tmp_path / "out", tp_size=9)
    assert not list(tmp_path.glob("out*"))
    threads = [thread for thread in threading.enumerate() if thread.name == "reshard-arrivals"]
    for thread in threads:
        thread.join(5)
    assert not [thread for thread in threads if thread.is_alive()]
    assert not list(tmp_path.glob("out*"))


def test_fetching_begins_before_the_plan_is_made(
    published: FakeHub, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, seen = reshard.operations.plan.build_plan, []

    def slow(*arguments: Any, **options: Any) -> Any:
        end = time.monotonic() + 20
        while len(seen) < 2 and time.monotonic() < end:
            seen[:] = [r for r in published.requests if WEIGHTS.fullmatch(str(r)) and "range" not in r.headers]
            time.sleep(0.01)
        return build(*arguments, **options)

    monkeypatch.setattr(reshard.operations.plan, "build_plan", slow)
    reshard.convert("org/model", tmp_path / "out", tp_size=2)
    assert len(seen) == 2
    assert_same(tmp_path / "out", local)


@pytest.mark.fault(4)
def test_room_for_two_source_files_is_asked_for(
    published: FakeHub, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        reshard.operations.convert.work, "check_free_space", lambda _, needed, *others: asked.append(needed)
    )
    reshard.convert("org/model", tmp_path / "out", tp_size=2)
    reshard.convert(checkpoint("llama"), tmp_path / "local", tp_size=2)
    assert asked[0] - asked[1] == sum(sorted(sizes_of(checkpoint("llama")).values())[-2:])


@pytest.mark.fault(27)
def test_a_cdn_gets_no_token(published: FakeHub, local: Path, tmp_path: Path) -> None:
    """Neither the range of a header nor a file is requested with the token."""
    published.cdn = True
    reshard.convert("org/model", tmp_path / "out", tp_size=2)
    assert_same(tmp_path / "out", local)
    elsewhere = [request for request in published.requests if request.path.startswith("/cdn/")]
    assert len(elsewhere) >= 6
    assert not [request for request in elsewhere if "authorization" in request.headers]


SEND = """
import pathlib, sys
from huggingface_hub import CommitOperationAdd, HfApi
files = [CommitOperationAdd(path.name, str(path)) for path in pathlib.Path(sys.argv[1]).iterdir()]
HfApi().preupload_lfs_files("org/model", files)
"""


def test_through_xet(home: Path, checkpoint: Checkpoint, local: Path, tmp_path: Path) -> None:
    """Large files come as they do today, in chunks from a content-addressed store. Only headers come by HTTP."""
    (tmp_path / "cas").mkdir()
    with FakeHub(cas=tmp_path / "cas") as hub:
        hub.create("org/model")
        assert hub.cas

        def run(*arguments: object) -> None:
            command = [sys.executable, *map(str, arguments)]
            done = subprocess.run(command, env=hub.environment(home), capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr

        run("-c", SEND, checkpoint("llama"))
        hub.xet_hashes = {digest: found for digest, (found, _) in xet.stored(hub.cas).items()}
        assert len(hub.xet_hashes) == 3
        hub.repos["org/model"].commit(contents(checkpoint("llama")))
        hub.requests.clear()
        run("-m", "reshard", "convert", "org/model", tmp_path / "out", "--tp-size", 2)
        assert_same(tmp_path / "out", local)
        bodies, headers = fetched(hub, sizes_of(checkpoint("llama")))
        assert sum(bodies.values()) == 0
        assert headers > 0
        assert hub.count("xet-read-token") >= 1

"""A remote resharded folder as a source: planned from headers, cut as its rank files arrive."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli_tools import RANK_FILES, Checkpoint, Cli, assert_one_error
from fake_hub import FakeHub
from kill_tools import interrupted_after
from object_store import ObjectStore, contents

import reshard
from reshard.errors import IntegrityError, StorageError
from reshard.storage.stores import Store

WHOLE = re.compile(r"GET .*/(shard-[^/]*\.safetensors)")


@pytest.fixture
def repo(here: FakeHub, resharded: Path) -> FakeHub:
    here.create("org/model", {f"tp2/{name}": data for name, data in contents(resharded).items()})
    return here


@pytest.fixture
def wider(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """The expected folder for four ranks."""
    reshard.convert(checkpoint("llama"), tmp_path / "wider", tp_size=4)
    return tmp_path / "wider"


def fetched(hub: FakeHub) -> list[str]:
    """Return the rank files that were requested in full, in order, without requests for headers."""
    matches = [(WHOLE.fullmatch(str(request)), request.headers.get("range", "")) for request in hub.requests]
    return [match[1] for match, asked in matches if match and not re.fullmatch(r"bytes=\d+-\d+", asked)]


def test_a_plan_reads_headers_only(repo: FakeHub, resharded: Path, home: Path, cli: Cli, tmp_path: Path) -> None:
    planned = reshard.plan("org/model/tp2", tp_size=4)
    assert planned.targets == reshard.plan(resharded, tp_size=4).targets
    assert cli("convert", "org/model/tp2", tmp_path / "out", "--tp-size", 4, "--dry-run").code == 0
    assert fetched(repo) == []
    assert not list(home.rglob("*.safetensors"))


def test_from_a_repo(repo: FakeHub, wider: Path, home: Path, out: Path) -> None:
    reshard.convert("org/model/tp2", out, tp_size=4)
    assert contents(out) == contents(wider)
    assert sorted(fetched(repo)) == RANK_FILES
    assert not list(home.rglob("*.safetensors"))
    assert not list(out.parent.glob("out.*"))


def test_from_a_store(store: ObjectStore, stored: str, wider: Path, out: Path) -> None:
    reshard.convert(stored, out, tp_size=4)
    assert contents(out) == contents(wider)


@pytest.mark.parametrize("after", [1, 9, 40])
def test_an_interrupted_conversion_fetches_nothing_twice(after: int, repo: FakeHub, wider: Path, out: Path) -> None:
    """Only files that were being fetched are fetched again."""
    with interrupted_after(after):
        reshard.convert("org/model/tp2", out, tp_size=4, workers=1)
    came = {path.name for path in out.parent.glob("out.part-fetched-*/tp2/*.safetensors")}
    assert RANK_FILES[0] in came
    repo.requests.clear()
    reshard.convert("org/model/tp2", out, tp_size=4)
    assert contents(out) == contents(wider)
    assert set(fetched(repo)) == set(RANK_FILES) - came
    assert not list(out.parent.glob("out.*"))


def test_what_comes_a_second_time_is_checked_again(store: ObjectStore, stored: str, wider: Path, out: Path) -> None:
    """A store gives no digests, and a power loss may have spoiled the files of an interrupted run."""
    with interrupted_after(60):
        reshard.convert(stored, out, tp_size=4, workers=1)
    real = Store.read

    def spoiled(self: Store, name: str, start: int, end: int) -> bytes:
        found = real(self, name, start, end)
        return found[:-1] + bytes([found[-1] ^ 1]) if name == RANK_FILES[1] and end - start > 16 << 10 else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "read", spoiled)
        with pytest.raises(IntegrityError, match="was altered"):
            reshard.convert(stored, out, tp_size=4)
    reshard.convert(stored, out, tp_size=4)
    assert contents(out) == contents(wider)


def test_a_rank_file_that_is_not_the_one_that_was_written(
    here: FakeHub, store: ObjectStore, resharded: Path, out: Path
) -> None:
    files = contents(resharded)
    altered = files[RANK_FILES[1]][:-1] + bytes([files[RANK_FILES[1]][-1] ^ 1])
    url = store.put("altered", {**files, RANK_FILES[1]: altered})
    here.create("org/altered", {**files, RANK_FILES[1]: altered})
    for place in (url, "org/altered"):
        with pytest.raises(IntegrityError, match="was altered"):
            reshard.convert(place, out, tp_size=4)
        assert not out.exists()
    here.create("org/short", {**files, RANK_FILES[1]: altered[:-4]})
    with pytest.raises(IntegrityError, match=r"expected \d+ bytes, got"):
        reshard.plan("org/short", tp_size=4)


def test_a_disk_that_is_too_small_keeps_nothing_of_what_came(
    repo: FakeHub, checkpoint: Checkpoint, out: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_small(*_: object) -> None:
        raise StorageError("needs 9 bytes, but only 8 are free")

    repo.create("org/llama", contents(checkpoint("llama")))
    monkeypatch.setattr("reshard.operations.convert.work.check_free_space", too_small)
    for place in ("org/model/tp2", "org/llama"):
        assert_one_error(cli("convert", place, out, "--tp-size", 4), 5, "only 8 are free")
        assert not list(out.parent.glob("out*"))

"""`reshard pull`, through the real client against the stand-in: the right bytes of one commit, or nothing is kept."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_tools import RANK_FILES, Cli, assert_one_error
from fake_hub import FakeHub, Fault, Handler, Reply, corrupt, drop, hang_up, ignore_range, stall, status
from torch.distributed import HashStore

import reshard
from reshard.errors import (
    BadInputError,
    DestinationExistsError,
    IntegrityError,
    NetworkError,
    TopologyError,
    UsageError,
)
from reshard.storage.locate import find_resharded
from runtime.distributed.agreement import Deadline
from runtime.loading.locate import locate_together

NAME = "org/model-tp2"
SECOND = RANK_FILES[1]
GET = f"GET .*/{SECOND}"


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder; a Hub's cache holds links, and `.cache` is the client's."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def expected(out: Path, *ranks: int) -> dict[str, bytes]:
    """Return the files that a pull of some ranks must give."""
    others = {name for rank, name in enumerate(RANK_FILES) if rank not in ranks} | {"unused.safetensors"}
    return {name: data for name, data in contents(out).items() if name not in others}


def kept(home: Path) -> list[bytes]:
    """Return the bytes of every file below the cache."""
    return [path.read_bytes() for path in home.rglob("*") if path.is_file()]


@pytest.fixture
def repo(here: FakeHub, resharded: Path) -> FakeHub:
    """The Hub, with a resharded repo that also holds a page and a stranger's file."""
    here.create(NAME, {**contents(resharded), "README.md": b"# Words\n", "notes.txt": b"-"})
    return here


@pytest.fixture
def fine_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client writes its data every thousand bytes, and can resume at each."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_one_rank_then_again_without_the_network(
    repo: FakeHub, resharded: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = cli("pull", NAME, "--rank", 1)
    assert result.code == 0, result
    folder = Path(result.out.strip())
    assert contents(folder) == expected(resharded, 1)
    assert repo.asked(NAME) == set(expected(resharded, 1))

    repo.requests.clear()
    assert cli("pull", NAME, "--rank", 1).out == result.out
    assert repo.asked(NAME) == set()
    go_offline(monkeypatch)
    repo.requests.clear()
    assert json.loads(cli("pull", NAME, "--rank", 1, "--format", "json").out) == {"folder": str(folder)}
    assert_one_error(cli("pull", NAME), 10, "not all of it is in the cache, and offline", hint="unset HF_HUB_OFFLINE")
    assert repo.requests == []


def test_ranks(repo: FakeHub, resharded: Path, cli: Cli) -> None:
    assert contents(reshard.pull(NAME, ranks=[0])) == expected(resharded, 0)
    folder = Path(cli("pull", NAME, "--ranks", "0-1").out.strip())
    assert contents(folder) == expected(resharded, 0, 1)
    assert contents(reshard.pull(NAME)) == contents(resharded)
    assert reshard.verify(folder).files == len(contents(resharded)) - 1
    with pytest.raises(TopologyError, match="has no rank 2") as refused:
        reshard.pull(NAME, ranks=range(4))
    assert refused.value.hint == "its ranks are 0 to 1"
    assert cli("pull", NAME, "--ranks", "0:1").code == 2
    assert cli("pull", NAME, "--ranks", "1-0").code == 2
    with pytest.raises(UsageError, match="no ranks"):
        reshard.pull(NAME, ranks=[])


def test_the_ranks_of_a_machine(repo: FakeHub, resharded: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    second = Path(cli("pull", NAME, "--part", "2/2").out.strip())
    assert contents(second) == expected(resharded, 1)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    assert cli("pull", NAME, "--part", "auto/2").out.strip() == str(second)
    assert contents(second) == expected(resharded, 0, 1)
    assert_one_error(cli("pull", NAME, "--part", "auto"), 2, "does not say how many", hint="--part auto/8")
    assert_one_error(cli("pull", NAME, "--part", "1/3"), 2, "3 parts of 2 rank files")
    assert_one_error(cli("pull", NAME, "--part", "0/2"), 2, "'0/2' is no part", hint="3/8")
    assert_one_error(cli("pull", NAME, "--part", "1/2", "--rank", "0"), 2, "both --ranks and --part are given")


def test_into_a_folder(repo: FakeHub, resharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = reshard.pull(NAME, ranks=[1], to=tmp_path / "here")
    assert folder == tmp_path / "here"
    assert contents(folder) == expected(resharded, 1)
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    reshard.pull(NAME, to=folder)
    assert contents(folder) == contents(resharded)
    go_offline(monkeypatch)
    repo.requests.clear()
    assert reshard.pull(NAME, to=folder) == folder
    assert repo.requests == []


def test_into_a_folder_of_another_model(repo: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "reshard.json").write_text("{}")
    with pytest.raises(DestinationExistsError, match="holds another resharded model"):
        reshard.pull(NAME, to=tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["reshard.json"]


def test_into_a_folder_with_files_of_other_making(
    repo: FakeHub, resharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's files are not replaced; an interrupted run is continued."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "config.json").write_text('{"mine": 1}')
    with pytest.raises(DestinationExistsError, match=r"config\.json: is there already"):
        reshard.pull(NAME, to=folder)
    assert contents(folder) == {"config.json": b'{"mine": 1}'}
    shutil.copyfile(resharded / "config.json", folder / "config.json")
    shutil.copyfile(resharded / SECOND, folder / SECOND)
    reshard.pull(NAME, ranks=[1], to=folder)
    assert contents(folder) == expected(resharded, 1)


def test_the_root_of_a_repo_holds_one_degree_and_a_folder_another(
    here: FakeHub, resharded: Path, tmp_path: Path
) -> None:
    reshard.convert(resharded, tmp_path / "four", tp_size=4)
    wider = {f"tp4/{name}": data for name, data in contents(tmp_path / "four").items()}
    here.create("org/model", contents(resharded) | wider)
    assert find_resharded("org/model", world_size=4).place == "org/model/tp4"
    assert find_resharded("org/model", world_size=2).place == "org/model"
    assert find_resharded("org/model", world_size=3).manifest.world_size == 2


def test_a_folder_of_a_repo(here: FakeHub, resharded: Path, tmp_path: Path, cli: Cli) -> None:
    here.create(
        "org/model", {f"{tp}/{name}": data for tp in ("tp2", "tp10") for name, data in contents(resharded).items()}
    )
    folder = reshard.pull("org/model/tp2", ranks=[0])
    assert folder.name == "tp2"
    assert contents(folder) == expected(resharded, 0)
    assert {path.split("/")[0] for path in here.asked("org/model")} == {"tp2"}
    assert reshard.pull("org/model/tp2", to=tmp_path / "to") == tmp_path / "to" / "tp2"
    assert contents(tmp_path / "to" / "tp2") == contents(resharded)
    assert reshard.inspect("org/model/tp10") == reshard.inspect(resharded)
    for command in (["pull", "org/model"], ["inspect", "org/model"]):
        assert_one_error(cli(*command), 9, "but in folders: tp2, tp10", hint="org/model/tp2")
    assert_one_error(cli("pull", "org/model/tp4"), 3, "holds no reshard.json")


def test_all_files_are_of_one_commit(repo: FakeHub, resharded: Path) -> None:
    """The repo moves on between the manifest and the rest."""
    first = repo.repos[NAME].revisions["main"]

    def move(_: Handler, answer: Callable[[], Reply]) -> Reply:
        repo.repos[NAME].commit(dict.fromkeys(contents(resharded), b"new"))
        return answer()

    repo.fail("HEAD .*/config.json", move)
    folder = reshard.pull(NAME)
    assert folder.name == first
    assert contents(folder) == contents(resharded)


def test_what_is_no_resharded_repo(here: FakeHub, tmp_path: Path) -> None:
    here.create("org/model", {"config.json": b"{}"})
    with pytest.raises(BadInputError, match=r"holds no reshard\.json"):
        reshard.pull("org/model")
    with pytest.raises(BadInputError, match="is a local folder"):
        reshard.pull(str(tmp_path))


def test_a_repo_that_lacks_a_rank_file(here: FakeHub, resharded: Path, tmp_path: Path, cli: Cli) -> None:
    """Fetching it again would not help. The files that the repo has can still be pulled."""
    here.create(NAME, {name: data for name, data in contents(resharded).items() if name != SECOND})
    assert cli("pull", NAME, "--rank", 0).code == 0
    for command in (
        ["pull", NAME],
        ["pull", NAME, "--to", tmp_path / "to"],
        ["merge", NAME, tmp_path / "merged"],
        ["convert", NAME, tmp_path / "out", "--tp-size", 4],
    ):
        done = cli(*command)
        assert_one_error(done, 4, f"{NAME}: has no {SECOND}")
        assert "fetch" not in done.err
    assert_one_error(cli("pull", NAME), 4, hint="published anew")
    together = {"first": True, "world_size": 2, "digests": True, "store": HashStore(), "deadline": Deadline.after(60)}
    assert locate_together(NAME, revision=None, rank=0, **together).manifest.world_size == 2
    with pytest.raises(IntegrityError, match=f"has no {SECOND}"):
        locate_together(NAME, revision=None, rank=1, **together)


def test_a_repo_that_holds_another_file_than_its_manifest_says(here: FakeHub, resharded: Path, cli: Cli) -> None:
    """Fetching the file again would give the same bytes."""
    data = bytearray(contents(resharded)[SECOND])
    data[-1] ^= 1
    here.create(NAME, {**contents(resharded), SECOND: bytes(data)})
    for _ in range(2):
        assert_one_error(cli("pull", NAME, "--rank", 1), 4, "altered", hint="the repo itself")
    here.repos[NAME].commit({SECOND: b"short"})
    assert_one_error(cli("pull", NAME, "--rank", 1), 4, "expected", hint="the repo itself")


def test_no_access(here: FakeHub, resharded: Path) -> None:
    here.create(NAME, contents(resharded), gated=True, token="hf_other")
    with pytest.raises(NetworkError, match="access is restricted"):
        reshard.pull(NAME)


def test_a_cdn_gets_no_token(repo: FakeHub, resharded: Path) -> None:
    """Large files come from another origin, which must not get the token."""
    repo.cdn = True
    assert contents(reshard.pull(NAME)) == contents(resharded)
    elsewhere = [request for request in repo.requests if request.path.startswith("/cdn/")]
    assert len(elsewhere) == 2
    assert not [request for request in elsewhere if "authorization" in request.headers]
    assert all("authorization" in request.headers for request in repo.requests if request not in elsewhere)


@pytest.mark.fault(16)
@pytest.mark.parametrize("name", [SECOND, "config.json", "reshard.json"])
@pytest.mark.parametrize("into", [None, "here"])
def test_wrong_bytes(
    name: str, into: str | None, repo: FakeHub, resharded: Path, home: Path, tmp_path: Path, cli: Cli
) -> None:
    """The bytes have the right size, so the client accepts them."""
    repo.fail(f"GET .*/{name}", corrupt())
    to = ["--to", tmp_path / into] if into else []
    assert_one_error(cli("pull", NAME, *to), 4, name)
    wrong = bytearray(contents(resharded)[name])
    wrong[-1] ^= 1
    assert bytes(wrong) not in kept(home) + kept(tmp_path)
    repo.requests.clear()
    folder = Path(cli("pull", NAME, *to).out.strip())
    assert contents(folder) == contents(resharded)
    assert name in repo.asked(NAME)
    assert name == SECOND or SECOND not in repo.asked(NAME) or name == "reshard.json"


@pytest.mark.fault(16)
def test_bytes_that_turn_wrong_in_the_cache(repo: FakeHub, resharded: Path) -> None:
    path = reshard.pull(NAME) / SECOND
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="was altered") as refused:
        reshard.pull(NAME)
    assert "was removed" in str(refused.value.hint)
    assert not path.is_symlink()
    assert contents(reshard.pull(NAME)) == contents(resharded)


@pytest.mark.fault(18)
@pytest.mark.usefixtures("fine_steps")
def test_a_connection_that_breaks(repo: FakeHub, resharded: Path) -> None:
    """Bytes that have arrived are not requested again."""
    size = len(contents(resharded)[SECOND])
    repo.fail(GET, drop(after=20_000), times=2)
    assert contents(reshard.pull(NAME)) == contents(resharded)
    ranges = [request.headers.get("range") for request in repo.requests if request.path.endswith(SECOND)]
    assert [found for found in ranges if found] == ["bytes=20000-", "bytes=40000-"]
    assert size > 40_000


@pytest.mark.fault(17)
@pytest.mark.usefixtures("fine_steps")
def test_content_that_changes_after_the_break(repo: FakeHub, resharded: Path, home: Path) -> None:
    """The client joins two halves of different files."""
    repo.fail(GET, drop(after=20_000))
    repo.fail(GET, corrupt())
    with pytest.raises(IntegrityError, match=SECOND):
        reshard.pull(NAME)
    wrong = bytearray(contents(resharded)[SECOND])
    wrong[-1] ^= 1
    assert bytes(wrong) not in kept(home)
    assert contents(reshard.pull(NAME)) == contents(resharded)


@pytest.mark.fault(18)
@pytest.mark.usefixtures("fine_steps")
def test_a_range_that_is_ignored(repo: FakeHub, resharded: Path) -> None:
    repo.fail(GET, drop(after=20_000))
    repo.fail(GET, ignore_range())
    assert contents(reshard.pull(NAME)) == contents(resharded)
    assert repo.faults_left == 0


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    ("request_", "fault"),
    [
        (GET, status(429, retry_after=2)),
        (GET, stall(after=10_000, seconds=20)),
        (GET, hang_up()),
        (f"HEAD .*/{SECOND}", status(503)),
        (f"HEAD .*/{SECOND}", status(429, retry_after=2)),
        (f"HEAD .*/{SECOND}", stall(seconds=20)),
    ],
    ids=["429", "stall", "hang up", "HEAD 503", "HEAD 429", "HEAD stalls"],
)
def test_a_request_that_fails_once(request_: str, fault: Fault, repo: FakeHub, resharded: Path) -> None:
    repo.fail(request_, fault)
    assert contents(reshard.pull(NAME)) == contents(resharded)
    assert repo.faults_left == 0


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    ("request_", "fault"),
    [
        (GET, drop(after=0)),
        (GET, status(429, retry_after=2)),
        (GET, status(503)),
        (GET, stall(seconds=20)),
        (f"HEAD .*/{SECOND}", status(500)),
        ("GET /api/models/.*/tree", status(502)),
        ("GET /api/models/", stall(seconds=20)),
    ],
    ids=["drop", "429", "503", "stall", "HEAD 500", "tree 502", "stall at once"],
)
def test_a_hub_that_stays_broken(request_: str, fault: Fault, repo: FakeHub, resharded: Path, cli: Cli) -> None:
    """The pull ends in bounded time, and the next one fetches only what is missing."""
    repo.fail(request_, fault, times=100)
    start = time.monotonic()
    assert_one_error(cli("pull", NAME, seconds=60), 10)
    assert time.monotonic() - start < 45
    came = repo.asked(NAME) - {SECOND}
    repo.recover()
    repo.requests.clear()
    assert contents(reshard.pull(NAME)) == contents(resharded)
    assert not repo.asked(NAME) & came

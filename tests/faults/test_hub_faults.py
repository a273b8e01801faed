"""Faults of the Hub, the network and the disk in requests that the client makes only once, and their errors."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_tools import Cli, assert_one_error
from fake_hub import FakeHub, Fault, Reply, hang_up, lose_answer, stall, status

import reshard
from reshard.errors import NetworkError, StorageError
from reshard.storage.hub.address import Place
from reshard.storage.hub.errors import explain
from reshard.storage.hub.session import client
from reshard.storage.hub.snapshot import snapshot as hub_snapshot

NAME = "org/model-tp2"
INFO = f"GET /api/models/{NAME}"
# A command against the Hub of its environment, without waiting between attempts.
AT_ONCE = """
import shutil, sys, time
time.sleep = lambda seconds: None
if "full" in sys.argv[1]:
    shutil.disk_usage = lambda path: type("", (), {"free": 1})
from reshard.cli.main import main
main(sys.argv[2:])
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def repo(here: FakeHub, resharded: Path) -> FakeHub:
    """The Hub, with a resharded repo."""
    here.create(NAME, contents(resharded))
    return here


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The lengths of all sleeps, none of which is slept."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def default_factory() -> Iterator[None]:
    """Afterwards the client makes its own sessions again."""
    from huggingface_hub.utils import _http

    _http.set_client_factory(_http.default_client_factory)
    yield
    _http.set_client_factory(_http.default_client_factory)


def limited(seconds: int) -> Fault:
    """Return the Hub's reply to too many requests."""
    return lambda handler, answer: Reply({}, 429, {"RateLimit": f'"api";r=0;t={seconds}'})


ONCE = [pytest.param(status(code), id=str(code)) for code in (408, 429, 500, 502, 503, 504)] + [
    pytest.param(fault, id=name) for name, fault in {"hang up": hang_up(), "lost": lose_answer()}.items()
]


@pytest.mark.fault(18)
@pytest.mark.parametrize("fault", ONCE)
def test_which_commit_is_asked_again(fault: Fault, repo: FakeHub, resharded: Path) -> None:
    repo.fail(INFO + "$", fault, times=3)
    assert contents(reshard.pull(NAME)) == contents(resharded)
    assert repo.faults_left == 0


@pytest.mark.fault(18)
@pytest.mark.parametrize("question", ["GET .*/model/tree/", "POST .*/paths-info/"])
def test_what_files_there_are_is_asked_again(
    question: str, here: FakeHub, checkpoint: Callable[..., Path], cli: Cli
) -> None:
    here.create("org/model", contents(checkpoint("llama")))
    here.fail(question, hang_up(), times=3)
    done = cli("plan", "org/model", "--tp-size", 2)
    assert (done.code, done.err) == (0, "")
    assert here.faults_left == 0


@pytest.mark.fault(18)
@pytest.mark.parametrize("code", [500, 502, 503, 504])
@pytest.mark.parametrize("cdn", [False, True])
def test_a_file_is_asked_for_again(cdn: bool, code: int, repo: FakeHub, resharded: Path) -> None:
    repo.cdn = cdn
    repo.fail("GET .*/shard-00001", status(code), times=3)
    assert contents(reshard.pull(NAME)) == contents(resharded)
    assert repo.faults_left == 0


@pytest.mark.fault(18)
def test_each_file_is_asked_for_again(repo: FakeHub, resharded: Path) -> None:
    """Failures of one file use up no attempts of another."""
    for name in contents(resharded):
        repo.fail(f"GET .*/{name}$", status(503), times=3)
    assert contents(reshard.pull(NAME)) == contents(resharded)
    assert repo.faults_left == 0
    repo.fail("GET .*/new.txt", status(503), times=100)
    repo.repos[NAME].commit({"new.txt": b"-"})
    with pytest.raises(NetworkError, match="too busy"):
        hub_snapshot(Place(NAME), revision=None, patterns=["new.txt"], ignored=(), to=None)
    assert repo.count("GET .*/new.txt") == 4


@pytest.mark.fault(18)
def test_headers_are_asked_for_again(here: FakeHub, checkpoint: Callable[..., Path], cli: Cli) -> None:
    here.create("org/model", contents(checkpoint("llama")))
    here.fail("GET .*safetensors", status(503), times=3)
    assert cli("plan", "org/model", "--tp-size", 2).code == 0
    here.fail("GET .*safetensors", status(503), times=1000)
    assert_one_error(cli("plan", "org/model", "--tp-size", 2), 10, "status 503")
    assert here.count("GET .*safetensors") < 60


@pytest.mark.fault(18)
@pytest.mark.parametrize("question", ["GET /api/models/org/out$", "POST /api/validate-yaml", "GET .*/out/tree/"])
def test_questions_of_publish_are_asked_again(question: str, here: FakeHub, resharded: Path, cli: Cli) -> None:
    repo = here.create("org/out", token="hf_test")
    here.fail(question, status(503), times=3)
    done = cli("publish", resharded, "org/out", "--private")
    assert done.code == 0, done
    assert done.err == ""
    assert here.faults_left == 0
    assert "reshard.json" in repo.files


@pytest.mark.fault(18)
def test_a_commit_is_not_made_again(here: FakeHub, resharded: Path, cli: Cli) -> None:
    """The first commit may have been made."""
    here.create("org/out", token="hf_test")
    here.fail("POST .*/commit/", lose_answer(), times=5)
    assert_one_error(cli("publish", resharded, "org/out", "--private"), 10, "could not commit")
    assert here.count("POST .*/commit/") == 1


@pytest.mark.fault(18)
def test_a_licence_that_cannot_be_asked_for_is_no_obstacle(
    here: FakeHub, checkpoint: Callable[..., Path], tmp_path: Path, cli: Cli
) -> None:
    """The licence is unknown because the network fails."""
    card = b"---\nlicense: mit\n---\n"
    here.create("org/model", {**contents(checkpoint("llama")), "README.md": card})
    reshard.convert("org/model", tmp_path / "out", tp_size=2)
    here.fail("GET /api/models/org/model$", status(503), times=100)
    assert_one_error(cli("publish", tmp_path / "out", "org/out"), 10, "ask for its licence", "status 503")
    here.recover()
    here.fail("GET /api/models/org/model$", status(503), times=3)
    assert cli("publish", tmp_path / "out", "org/out").code == 0


@pytest.mark.fault(18)
def test_a_request_that_fails_gives_no_older_commit(
    repo: FakeHub, resharded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only a Hub that does not answer at all gives an older commit, with a warning."""
    first = reshard.pull(NAME)
    second = repo.repos[NAME].commit({"config.json": (resharded / "config.json").read_bytes(), "new.txt": b"-"})
    repo.fail(INFO + "$", status(503), times=3)
    assert reshard.pull(NAME).name == second != first.name
    assert not caplog.messages

    repo.repos[NAME].commit({"new.txt": b"+"})
    repo.fail(INFO, status(503), times=100)
    folder = reshard.pull(NAME)
    assert folder.name == second
    assert contents(folder) == contents(resharded)
    assert caplog.messages == [f"{NAME}: the Hub does not answer; using commit {second} of the cache"]


def test_the_cache_knows_the_commit_by_its_name(repo: FakeHub, home: Path) -> None:
    """The name is stored as the client does, so that other programs find it too."""
    folder = reshard.pull(NAME, ranks=[0])
    assert [path.name for path in (folder.parents[1] / "refs").iterdir()] == ["main"]
    assert (folder.parents[1] / "refs" / "main").read_text() == folder.name
    (home / "plain").touch()
    assert (folder.parents[1] / "refs" / "main").stat().st_mode == (home / "plain").stat().st_mode


@pytest.mark.fault(18)
def test_a_refusal_gives_nothing_of_the_cache(repo: FakeHub) -> None:
    reshard.pull(NAME)
    repo.fail(INFO, status(403), times=100)
    with pytest.raises(NetworkError):
        reshard.pull(NAME)


def refusal(code: int, why: str = "", message: str = "") -> Fault:
    """Return the Hub's reply to a refused request: a name for the reason, and words."""
    headers = {"X-Error-Code": why, "X-Error-Message": message}
    return lambda handler, answer: Reply({}, code, {name: value for name, value in headers.items() if value})


REFUSALS = {
    "ended": (refusal(401, message="Invalid credentials"), "does not take the token (Invalid cred", "correct HF_TOKEN"),
    "no right": (
        refusal(403, message="Enable gated"),
        "token has not the right to read it (Enable gated)",
        "read access",
    ),
    "gated": (refusal(403, "GatedRepo"), "access is restricted", "with the account of the token"),
    "disabled": (refusal(403, message="Access to this resource is disabled."), "the Hub has disabled it", ""),
    "hidden": (refusal(404, "RepoNotFound"), "no such repo", "one that the token may see"),
    "other": (refusal(410), "could not be fetched", ""),
    "busy": (status(503), "too busy", "try again later"),
}


@pytest.mark.parametrize(
    "request_", ["GET /api/models/", "GET .*/tree/", "HEAD .*/reshard.json", "GET .*/reshard.json"]
)
@pytest.mark.parametrize(("fault", "words", "hint"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_not_taken_for_a_bad_connection(
    fault: Fault, words: str, hint: str, request_: str, repo: FakeHub, cli: Cli
) -> None:
    """The error says what is refused, and what helps."""
    repo.fail(request_, fault, times=1000)
    done = cli("inspect", NAME)
    assert_one_error(done, 10, words, hint=hint)
    assert "connection" not in done.err
    if not hint:
        assert "Hint" not in done.err


def test_without_a_token(repo: FakeHub, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    repo.fail("GET /api/models/", refusal(401))
    assert_one_error(cli("inspect", NAME), 10, "the Hub asks for a token", hint="hf auth login")
    repo.fail("GET .*/reshard.json", refusal(401, "GatedRepo"))
    assert_one_error(cli("inspect", NAME), 10, "access is restricted", hint="log in with: hf auth login")
    repo.fail("GET /api/models/", refusal(401, "RepoNotFound"))
    assert_one_error(cli("inspect", NAME), 10, "or it is private", hint="needs: hf auth login")


def test_a_file_that_has_gone(repo: FakeHub, cli: Cli) -> None:
    repo.fail("HEAD .*/reshard.json", refusal(404, "EntryNotFound"))
    done = cli("inspect", NAME)
    assert_one_error(done, 3, "the repo has no such file", "reshard.json")
    assert "connection" not in done.err


@pytest.mark.fault(18)
def test_the_note_is_one_line(
    hub: FakeHub, resharded: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    commit = hub.create(NAME, contents(resharded)).revisions["main"]
    command = ("-c", AT_ONCE, "", "pull", NAME, "--rank", 0)
    first = python(*command)
    assert (first.returncode, first.stderr) == (0, "")
    hub.fail("", status(503), times=1000)
    again = python(*command)
    assert again.stdout == first.stdout
    assert again.stderr == f"{NAME}: the Hub does not answer; using commit {commit} of the cache\n"


@pytest.mark.fault(18)
@pytest.mark.parametrize("offline", [False, True])
def test_a_part_of_a_repo_is_not_taken_for_all(
    offline: bool, repo: FakeHub, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache holds only the files that another program wanted."""
    from huggingface_hub import hf_hub_download

    hf_hub_download(NAME, "config.json")
    repo.requests.clear()
    if offline:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        for command in ("inspect", "pull"):
            assert_one_error(cli(command, NAME), 10, "not in the cache, and offline", hint="unset HF_HUB_OFFLINE")
        assert repo.requests == []
        return
    repo.fail("GET .*/tree/", status(503), times=100)
    assert_one_error(cli("inspect", NAME), 10, "too busy")
    repo.fail("", hang_up(), times=100)
    assert_one_error(cli("inspect", NAME), 10)


def test_offline_and_not_here(here: FakeHub, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = cli("inspect", "org/none")
    assert_one_error(done, 10, "no such folder here, not in the cache, and offline", hint="unset HF_HUB_OFFLINE")
    assert "connection" not in done.err


def test_a_cache_that_cannot_be_written(
    repo: FakeHub, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(file))
    assert_one_error(cli("pull", NAME), 5, str(file))


@pytest.mark.fault(5, 6)
@pytest.mark.parametrize(
    "number", ["ENOENT", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "EIO", "ENOSPC", "EDQUOT", "EROFS"]
)
def test_what_the_disk_says(number: str) -> None:
    """The error comes by itself, as the cause of another error, or in the words of hf_xet."""
    code = getattr(errno, number)
    bare = OSError(code, os.strerror(code), "/cache/blobs/x")
    told = f"org/model: could not be kept here: /cache/blobs/x: {os.strerror(code)}"
    wrapped = RuntimeError("Data processing error")
    wrapped.__cause__ = bare
    for error in (bare, wrapped):
        found = explain(error, "org/model")
        assert isinstance(found, StorageError)
        assert found.message == told
    words = RuntimeError(
        f"Data processing error: File reconstruction error: IO Error: {os.strerror(code)} (os error {code})"
    )
    found = explain(words, "org/model")
    assert isinstance(found, StorageError)
    assert os.strerror(code) in found.message


@pytest.mark.parametrize("number", ["ECONNREFUSED", "ECONNRESET", "EHOSTUNREACH", "EACCES", "ENOENT"])
def test_what_a_socket_says(number: str) -> None:
    code = getattr(errno, number)
    assert isinstance(explain(OSError(code, os.strerror(code)), "org/model"), NetworkError)
    if number.startswith(("EC", "EH")):
        assert isinstance(explain(RuntimeError(f"IO Error (os error {code})"), "org/model"), NetworkError)


def test_the_same_is_not_said_twice() -> None:
    class RemoteProtocolError(Exception):
        pass

    error = RemoteProtocolError("Server disconnected")
    error.__cause__ = RemoteProtocolError("Server disconnected")
    assert explain(error, "org/model").message.count("Server disconnected") == 1
    error.__cause__ = OSError("reset")
    assert explain(error, "org/model").message.endswith("RemoteProtocolError: Server disconnected (OSError: reset)")


@pytest.mark.fault(18)
@pytest.mark.usefixtures("default_factory")
def test_patience_outlasts_the_session(here: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client closes its session if it cannot connect; the next one has no timeout of its own."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import close_session

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    here.fail("GET /api/whoami-v2", stall(seconds=10))
    start = time.monotonic()
    with client():
        close_session()
        with pytest.raises(Exception, match="timed out"):
            HfApi().whoami()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.usefixtures("default_factory")
def test_a_session_of_the_users_stays(bare: bool, repo: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session is the client's own kind with another header, or one without a timeout."""
    from huggingface_hub.utils import _http, close_session, get_session, set_client_factory

    kind = type(get_session())

    def make() -> object:
        session = kind(timeout=None) if bare else _http.default_client_factory()
        session.headers["x-own"] = "1"
        return session

    with client():
        pass
    set_client_factory(make)
    reshard.pull(NAME, ranks=[0])
    close_session()
    repo.fail(INFO, status(503))
    reshard.pull(NAME)
    assert {request.headers.get("x-own") for request in repo.requests} == {"1"}
    assert repo.faults_left == 0

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    close_session()
    repo.fail(INFO, stall(seconds=10), times=4)
    start = time.monotonic()
    reshard.pull(NAME)  # from the cache
    assert time.monotonic() - start < 5
    assert repo.faults_left == 0


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    "fault", [status(429, retry_after=100_000), status(503, retry_after=100_000), limited(100_000)]
)
@pytest.mark.parametrize("request_", [INFO + "$", "GET .*/config.json", "HEAD .*/config.json"])
def test_a_pause_is_bounded(request_: str, fault: Fault, repo: FakeHub, resharded: Path, pauses: list[float]) -> None:
    repo.fail(request_, fault, times=2)
    assert contents(reshard.pull(NAME)) == contents(resharded)
    assert repo.faults_left == 0
    assert 60 <= max(pauses) <= 61


def test_a_pause_that_is_asked_for_is_made(repo: FakeHub, pauses: list[float]) -> None:
    repo.fail(INFO + "$", status(429, retry_after=17))
    reshard.pull(NAME, ranks=[0])
    assert pauses == [17]


@pytest.mark.parametrize("full", ["", "full"])
def test_nothing_is_said_of_what_went_well(
    full: str, hub: FakeHub, resharded: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    hub.create(NAME, contents(resharded))
    hub.fail("GET .*safetensors", status(503), times=2)
    hub.fail("HEAD .*config.json", status(429, retry_after=1))
    done = python("-c", AT_ONCE, full, "pull", NAME, "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
    assert contents(Path(json.loads(done.stdout)["folder"])) == contents(resharded)
    assert hub.faults_left == 0


def test_the_log_of_the_process_is_as_it_was() -> None:
    """The level is restored after several threads too; a level that the user set stays throughout."""
    logger = logging.getLogger("huggingface_hub")
    assert logger.level == logging.WARNING
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with client():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with client():
        thread.start()
        assert inside.wait(10)
    assert logger.level == logging.ERROR
    leave.set()
    thread.join()
    assert logger.level == logging.WARNING
    logger.setLevel(logging.INFO)
    try:
        with client():
            assert logger.level == logging.INFO
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(logging.WARNING)

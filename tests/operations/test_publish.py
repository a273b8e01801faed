"""`reshard publish`, through the real client against the stand-in: one commit, or nothing visible."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import warm_commands
from cli_tools import RANK_FILES, Cli, Result, assert_one_error, flip
from fake_hub import FakeHub, Fault, Handler, Reply, hang_up, lose_answer, stall, status

import reshard
from reshard.errors import DestinationExistsError, IntegrityError, NetworkError, PolicyError, RemoteMovedError

NAME = "org/model-tp2"
PUT = "PUT /lfs/"
COMMIT = "POST .*/commit/"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def published(hub: FakeHub, name: str = NAME, branch: str = "main") -> dict[str, bytes]:
    """Return the files of a branch, without the card, its pictures and the Hub's own file."""
    repo = hub.repos[name]
    tree = repo.commits[repo.revisions[branch]]
    beside = (".gitattributes", "README.md")
    return {path: data for path, data in tree.items() if path not in beside and not path.endswith(".svg")}


@pytest.fixture(scope="module")
def degrees(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The llama checkpoint on two and on four ranks. Read only."""
    root = tmp_path_factory.mktemp("degrees")
    for size in (2, 4):
        reshard.convert(checkpoint("llama"), root / f"tp{size}", tp_size=size)
    return {size: root / f"tp{size}" for size in (2, 4)}


@pytest.fixture
def of_hub(resharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A resharded folder whose manifest names `org/model` as its source."""
    folder = tmp_path / "of-hub"
    folder.mkdir()
    for path in resharded.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    manifest = dataclasses.replace(reshard.inspect(folder), repo_id="org/model", commit="0" * 40)
    (folder / "reshard.json").write_bytes(manifest.to_bytes())
    return folder


def card_of(licence: str = "license: apache-2.0\n") -> dict[str, bytes]:
    return {"README.md": f"---\n{licence}pipeline_tag: text-generation\n---\nSecret upstream words\n".encode()}


def test_one_commit_that_holds_everything(here: FakeHub, of_hub: Path) -> None:
    here.create("org/model", card_of())
    done = reshard.publish(of_hub, NAME)
    repo = here.repos[NAME]
    assert published(here) == contents(of_hub)
    assert len(repo.commits) == 2  # the Hub's first commit, and ours
    assert done.commit == repo.revisions["main"]
    assert (done.private, done.licence, done.card) == (False, "apache-2.0", True)
    beside = [repo.files["README.md"], repo.files["reshard.svg"]]
    assert done.size == sum(map(len, [*published(here).values(), *beside]))
    assert done.files == len(published(here)) + 2
    assert here.count(PUT) == 2  # the rank files
    assert b"license: apache-2.0\n" in repo.files["README.md"]
    assert b"Secret upstream words" not in repo.files["README.md"]


def test_again_changes_nothing(here: FakeHub, resharded: Path) -> None:
    first = reshard.publish(resharded, NAME, private=True)
    here.requests.clear()
    again = reshard.publish(resharded, NAME, private=True)
    assert again.commit == first.commit
    assert (here.count(PUT), here.count(COMMIT)) == (0, 0)
    assert len(here.repos[NAME].commits) == 2


def test_a_local_folder_of_the_same_name_is_not_the_repo(
    here: FakeHub, degrees: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size, folder in degrees.items():
        reshard.publish(folder, f"org/model/tp{size}", private=True)
        (tmp_path / "org" / "model" / f"tp{size}").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    done = reshard.publish(degrees[2], "org/model/tp4", private=True)
    assert set(done.deleted) == {f"tp4/{name}" for name in set(contents(degrees[4])) - set(contents(degrees[2]))}


def test_uploads_in_parts(here: FakeHub, resharded: Path) -> None:
    here.part_size = 50_000
    reshard.publish(resharded, NAME, private=True)
    assert here.count("PUT /lfs/.*/part/") == 4
    assert published(here) == contents(resharded)


def test_several_degrees_in_one_repo(here: FakeHub, degrees: dict[int, Path]) -> None:
    for size, folder in degrees.items():
        reshard.publish(folder, f"org/model/tp{size}", private=True)
    expected = {f"tp{size}/{name}": data for size, out in degrees.items() for name, data in contents(out).items()}
    assert published(here, "org/model") == expected
    card = here.repos["org/model"].files["README.md"].decode()
    for size in degrees:
        assert f"- tp{size}\n" in card
        assert f"\nreshard run org/model/tp{size} --prompt " in card
    assert reshard.inspect("org/model/tp4") == reshard.inspect(degrees[4])
    assert (
        reshard.publish(degrees[2], "org/model/tp2", private=True).commit == here.repos["org/model"].revisions["main"]
    )


def test_another_degree_in_the_same_place(here: FakeHub, degrees: dict[int, Path]) -> None:
    """One commit writes the new files and deletes the earlier ones."""
    reshard.publish(degrees[4], NAME, private=True)
    done = reshard.publish(degrees[2], NAME, private=True)
    assert set(done.deleted) == set(contents(degrees[4])) - set(contents(degrees[2]))
    assert published(here) == contents(degrees[2])
    assert len(here.repos[NAME].commits) == 3


def test_other_weights_stay(here: FakeHub, degrees: dict[int, Path]) -> None:
    repo = here.create("org/model", {"model.safetensors": b"weights", "README.md": b"# By hand\n"})
    with pytest.raises(DestinationExistsError, match=r"holds other weights: model\.safetensors"):
        reshard.publish(degrees[2], "org/model", licence="mit")
    assert len(repo.commits) == 1
    done = reshard.publish(degrees[2], "org/model/tp2", licence="mit")
    assert not done.card
    assert repo.files["README.md"] == b"# By hand\n"
    assert repo.files["model.safetensors"] == b"weights"


@pytest.mark.parametrize("stated", ["mit", None])
def test_a_page_by_hand_that_says_another_licence(
    stated: str | None, here: FakeHub, checkpoint: Callable[..., Path], tmp_path: Path, cli: Cli
) -> None:
    """The page stays, so a licence given here would be shown nowhere."""
    folder = tmp_path / "out"
    here.create("org/source", {**contents(checkpoint("llama")), **card_of("license: mit\n")})
    reshard.convert("org/source" if stated is None else checkpoint("llama"), folder, tp_size=2)
    page = b"---\nlicense: apache-2.0\n---\n# By hand\n"
    repo = here.create(NAME, {"README.md": page})
    publish = ["publish", folder, NAME, *(["--license", stated] if stated else [])]
    words = f"{'--license' if stated else 'the source'} mit"
    assert_one_error(cli(*publish), 11, "its README.md says the licence apache-2.0", words, hint="correct it there")
    assert len(repo.commits) == 1
    repo.commit({"README.md": page.replace(b"apache-2.0", b"mit")})
    assert cli(*publish).code == 0
    assert b"# By hand" in repo.files["README.md"]


def test_the_licence_of_a_page_by_hand_is_named(here: FakeHub, resharded: Path, cli: Cli) -> None:
    here.create(NAME, {"README.md": b"---\nlicense: apache-2.0\n---\n# By hand\n"})
    assert_one_error(cli("publish", resharded, NAME), 11, "from a local folder", hint="--license apache-2.0")
    done = cli("publish", resharded, NAME, "--license", "Apache-2.0")
    assert "licence apache-2.0" in done.out.lower()


def test_a_branch_and_a_pull_request(here: FakeHub, degrees: dict[int, Path]) -> None:
    here.create(NAME)
    repo = here.repos[NAME]
    done = reshard.publish(degrees[2], NAME, revision="next/two", licence="mit")
    assert done.commit == repo.revisions["next/two"]
    assert published(here) == {}
    assert published(here, branch="next/two") == contents(degrees[2])
    assert "--revision next/two" in repo.commits[repo.revisions["next/two"]]["README.md"].decode()

    done = reshard.publish(degrees[4], NAME, licence="mit", create_pr=True)
    assert done.commit == repo.revisions["refs/pr/1"]
    assert str(done.url).endswith("/discussions/1")
    assert published(here) == {}
    assert published(here, branch="refs/pr/1") == contents(degrees[4])


def test_dry_run(here: FakeHub, resharded: Path, cli: Cli) -> None:
    result = cli("publish", resharded, NAME, "--private", "--dry-run")
    size = sum(map(len, contents(resharded).values()))
    assert result.code == 0, result
    assert result.out.startswith(f"{NAME}@main: would be {len(contents(resharded)) + 2} files, ")
    assert "private, licence not known" in result.out
    report = json.loads(cli("publish", resharded, NAME, "--private", "--dry-run", "--format", "json").out)
    assert report["size"] > size
    assert report["commit"] is None
    assert NAME not in here.repos
    assert here.count("POST (?!.*validate-yaml)") == 0


@pytest.mark.parametrize(
    ("card", "gated", "private", "why"),
    [
        (card_of("license: llama3.1\n"), True, False, "org/model is gated"),
        (card_of(""), False, False, "org/model names no licence"),
        ({}, False, False, "org/model names no licence"),
        (card_of(), False, True, "org/model is private"),
        (None, False, False, "cannot be asked for a licence"),
    ],
    ids=["gated", "no licence", "no card", "private", "gone"],
)
def test_what_takes_your_word(
    card: dict[str, bytes] | None, gated: bool, private: bool, why: str, here: FakeHub, of_hub: Path
) -> None:
    """Publishing openly needs the licence's name; publishing privately does not."""
    if card is not None:
        here.create("org/model", card, gated=gated, token="hf_test" if gated or private else None)
    with pytest.raises(PolicyError, match=why) as refused:
        reshard.publish(of_hub, NAME)
    assert refused.value.exit_code == 11
    assert "--license" in str(refused.value.hint)
    assert "--private" in str(refused.value.hint)
    assert NAME not in here.repos
    reshard.publish(of_hub, NAME, private=True)
    assert here.repos[NAME].private
    known = "llama3.1" if gated else "apache-2.0"
    assert reshard.publish(of_hub, "org/open", licence=known).licence == known
    assert not here.repos["org/open"].private
    assert f"license: {known}\n".encode() in here.repos["org/open"].files["README.md"]


def test_a_local_source_takes_your_word(here: FakeHub, resharded: Path) -> None:
    with pytest.raises(PolicyError, match="made from a local folder"):
        reshard.publish(resharded, NAME)
    assert reshard.publish(resharded, NAME, licence="mit").licence == "mit"


def test_another_licence_than_the_source_says(here: FakeHub, of_hub: Path) -> None:
    here.create("org/model", card_of())
    with pytest.raises(PolicyError, match=r"under the licence apache-2\.0, not mit"):
        reshard.publish(of_hub, NAME, licence="mit")


def test_private_in_a_public_repo(here: FakeHub, resharded: Path) -> None:
    here.create(NAME)
    with pytest.raises(PolicyError, match="is public"):
        reshard.publish(resharded, NAME, private=True)


@pytest.mark.parametrize("place", ["model", "./there", "org/../x"])
def test_a_place_that_is_none(place: str, here: FakeHub, resharded: Path, refused: Callable[..., Result]) -> None:
    refused(3, ["publish", resharded, place], "not a")
    assert here.requests == []


def test_an_altered_folder_is_not_published(here: FakeHub, folder: Path, refused: Callable[..., Result]) -> None:
    flip(folder / RANK_FILES[1], -1)
    refused(4, ["publish", folder, NAME, "--private"], RANK_FILES[1], "was altered")
    assert here.requests == []


def test_no_right_to_write(here: FakeHub, resharded: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    here.readers.add("hf_test")
    publish = ["publish", resharded, NAME, "--license", "mit"]
    assert_one_error(cli(*publish), 10, "the token has not the right to create the repo", hint="write access")
    here.create(NAME)
    assert_one_error(cli(*publish), 10, "the token has not the right to upload files", hint="write access")
    monkeypatch.setenv("HF_TOKEN", "")
    assert_one_error(cli(*publish), 10, "to upload files needs a token", hint="hf auth login")
    monkeypatch.setenv("HF_TOKEN", "hf_ended")
    here.fail("POST .*/preupload/", status(401))
    assert_one_error(cli(*publish), 10, "the Hub does not take the token", hint="correct HF_TOKEN")
    here.fail("GET /api/models/", status(403))
    assert_one_error(cli(*publish), 10, "the token has not the right to look it up", hint="read access")
    here.fail("POST .*/preupload/", status(413))
    done = cli(*publish)
    assert_one_error(done, 10, "could not upload files", "413")
    assert "Hint" not in done.err
    assert len(here.repos[NAME].commits) == 1


@pytest.mark.fault(26)
def test_the_repo_moves_meanwhile(here: FakeHub, resharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody commits while files are uploaded: nothing is published; the next run sends nothing twice."""
    import huggingface_hub

    repo = here.create(NAME)
    upload = huggingface_hub.HfApi.preupload_lfs_files

    def and_somebody_else(*arguments: object, **options: object) -> None:
        upload(*arguments, **options)
        if len(repo.commits) == 1:
            repo.commit({"notes.txt": b"mine"})

    monkeypatch.setattr(huggingface_hub.HfApi, "preupload_lfs_files", and_somebody_else)
    with pytest.raises(RemoteMovedError) as moved:
        reshard.publish(resharded, NAME, licence="mit")
    assert moved.value.exit_code == 12
    assert published(here) == {"notes.txt": b"mine"}
    here.requests.clear()
    reshard.publish(resharded, NAME, licence="mit")
    assert here.count(PUT) == 0
    assert published(here) == {"notes.txt": b"mine", **contents(resharded)}


@pytest.mark.fault(26)
@pytest.mark.parametrize("request_", [PUT, "POST .*objects/batch", "POST .*preupload", COMMIT])
def test_interrupted_anywhere(request_: str, here: FakeHub, resharded: Path) -> None:
    """The Hub fails from some request on: nothing that was sent is visible, and it is not sent again."""
    repo = here.create(NAME)
    here.fail(request_, status(503), times=20)
    with pytest.raises(NetworkError, match="too busy"):
        reshard.publish(resharded, NAME, licence="mit")
    assert published(here) == {}
    assert len(repo.commits) == 1
    sent = len(here.objects)
    here.recover()
    here.requests.clear()
    reshard.publish(resharded, NAME, licence="mit")
    assert published(here) == contents(resharded)
    assert here.count(PUT) == 2 - sent


@pytest.mark.fault(26)
def test_the_answer_to_the_commit_is_lost(here: FakeHub, resharded: Path) -> None:
    """The client cannot know whether the commit was made; the next run finds it, and makes no other."""
    repo = here.create(NAME)
    here.fail(COMMIT, lose_answer())
    with pytest.raises(NetworkError, match="could not commit"):
        reshard.publish(resharded, NAME, licence="mit")
    assert len(repo.commits) == 2
    done = reshard.publish(resharded, NAME, licence="mit")
    assert len(repo.commits) == 2
    assert done.commit == repo.revisions["main"]


@pytest.mark.fault(18)
@pytest.mark.parametrize("fault", [status(500), status(429, retry_after=1), hang_up(), stall(seconds=20)])
def test_a_request_that_fails_once(fault: Fault, here: FakeHub, resharded: Path) -> None:
    here.fail(PUT, fault)
    reshard.publish(resharded, NAME, private=True)
    assert here.faults_left == 0
    assert published(here) == contents(resharded)


@pytest.mark.fault(18)
def test_a_hub_that_says_nothing(here: FakeHub, resharded: Path) -> None:
    here.fail("GET /api/models", stall(seconds=60), times=10)
    start = time.monotonic()
    with pytest.raises(NetworkError, match="could not look it up: ReadTimeout"):
        reshard.publish(resharded, NAME, private=True)
    assert time.monotonic() - start < 30


@pytest.mark.fault(26)
def test_what_the_hub_then_holds_is_compared(here: FakeHub, resharded: Path) -> None:
    """After the commit, the Hub holds another file of the same size."""

    def commit_something_else(_: Handler, answer: Callable[[], Reply]) -> Reply:
        reply = answer()
        here.repos[NAME].files["config.json"] = bytes(len(here.repos[NAME].files["config.json"]))
        return reply

    here.fail(COMMIT, commit_something_else)
    with pytest.raises(IntegrityError, match=r"does not hold what was sent: config\.json"):
        reshard.publish(resharded, NAME, private=True)


def test_through_xet(home: Path, tmp_path: Path, resharded: Path) -> None:
    """Uploads work as on the Hub today: chunks go to a content-addressed store, here a folder, and each only once."""
    cas = tmp_path / "cas"
    cas.mkdir()
    with FakeHub(cas=cas) as hub:
        hub.create(NAME)

        def run(*arguments: object) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "reshard", *map(str, arguments)]
            return subprocess.run(command, env=hub.environment(home), capture_output=True, text=True, timeout=300)

        hub.fail(COMMIT, status(412))
        refused = run("publish", resharded, NAME, "--license", "mit")
        assert refused.returncode == 12, refused.stderr
        stored = sum(path.stat().st_size for path in (cas / "xet" / "xorbs" / "xorbs").iterdir())
        assert stored > 0

        done = run("publish", resharded, NAME, "--license", "mit")
        assert done.returncode == 0, done.stderr
        assert published(hub) == contents(resharded)
        assert hub.count("xet-write-token") >= 1
        assert hub.count(PUT) == 0
        assert sum(path.stat().st_size for path in (cas / "xet" / "xorbs" / "xorbs").iterdir()) == stored

        pulled = run("pull", NAME, "--rank", 1)
        assert pulled.returncode == 0, pulled.stderr
        folder = Path(pulled.stdout.strip())
        assert (folder / RANK_FILES[1]).read_bytes() == contents(resharded)[RANK_FILES[1]]
        assert hub.count("xet-read-token") == 1
        assert hub.count(f"GET .*/{RANK_FILES[1]}") == 0


@pytest.mark.fault(26)
def test_ctrl_c_while_uploading(hub: FakeHub, home: Path, resharded: Path) -> None:
    hub.fail(PUT, stall(seconds=5), times=2)  # the client waits for running uploads
    command = [warm_commands.python(), "-m", "reshard", "publish", str(resharded), NAME, "--private"]
    process = subprocess.Popen(
        command, env=hub.environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while hub.count(PUT) == 0 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, ""), err
    assert "Error: interrupted\nHint: the same command goes on" in err
    assert published(hub) == {}

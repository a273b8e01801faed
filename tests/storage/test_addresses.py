"""Every address of one folder, and texts that are no address."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Cli, Refused, assert_one_error, convert
from fake_hub import FakeHub
from object_store import ObjectStore, contents

import reshard
from reshard.errors import BadInputError, UsageError
from reshard.storage.hub.address import Place
from reshard.storage.locate import find_resharded, local_folder, locate

PLACES = ["org/model", "org/model/", "hf://org/model", "{hub}/org/model", "{hub}/org/model/tree/main?tab=x#y"]


@pytest.mark.parametrize("place", PLACES)
def test_a_source_on_the_hub(place: str, here: FakeHub, source: Path, out: Path) -> None:
    """Whatever its address, the manifest has the source's id and commit."""
    repo = here.create("org/model", contents(source))
    manifest = reshard.convert(place.format(hub=here.url), out, tp_size=2)
    assert (manifest.repo_id, manifest.commit) == ("org/model", repo.revisions["main"])


@pytest.mark.parametrize("place", ["org/model/tp2/", "hf://org/model/tp2", "{hub}/org/model/tree/main/tp2"])
def test_publish_and_pull(place: str, here: FakeHub, resharded: Path) -> None:
    place = place.format(hub=here.url)
    done = reshard.publish(resharded, place, private=True)
    assert (done.repo_id, done.path) == ("org/model", "tp2")
    assert contents(reshard.pull(place)) == contents(resharded)
    assert reshard.inspect(place.replace("/tp2", "/tp2/")) == reshard.inspect(resharded)


@pytest.mark.parametrize("start", ["https://huggingface.co", "https://hf.co"])
def test_the_hub_s_own_address(start: str, here: FakeHub) -> None:
    """These addresses stay the Hub even if another endpoint is set."""
    assert Place.parse(f"{start}/org/model") == Place("org/model")


@pytest.mark.parametrize(
    "place",
    ["hf://org/model@next", "{hub}/org/model/tree/next", "{hub}/org/model/blob/main/x.json", "{hub}/org/m/resolve/a/b"],
)
def test_an_address_that_says_more(place: str, here: FakeHub) -> None:
    with pytest.raises(UsageError, match="names a revision, or a file") as refused:
        locate(place.format(hub=here.url))
    assert "--revision" in str(refused.value.hint)
    assert here.requests == []


@pytest.mark.parametrize("place", ["hf://datasets/org/x", "{hub}/spaces/org/x", "{hub}/", "hf://", "{hub}/org/x y"])
def test_an_address_that_is_no_model_s(place: str, here: FakeHub) -> None:
    with pytest.raises(BadInputError, match="not a Hub id"):
        locate(place.format(hub=here.url))
    assert here.requests == []


def test_nothing_is_converted_onto_the_hub(here: FakeHub, source: Path, refused: Refused) -> None:
    for place in ("hf://org/model", f"{here.url}/org/model"):
        refused(2, convert(source, place), "is on the Hub", hint="reshard publish")


@pytest.mark.parametrize("name", ["a" * 300, "org/" + "a" * 300, "./" + "a" * 300, "a\0b"])
def test_a_name_that_none_can_have(name: str, out: Path, refused: Refused) -> None:
    refused(3, convert(name, out), "")
    refused(3, ["inspect", name], "")
    refused(3, ["pull", name], "")


def test_publish_names_what_a_store_takes(resharded: Path, refused: Refused) -> None:
    refused(2, ["publish", resharded, "s3://bucket/x"], "not a place on the Hub", hint="convert")


# --- URLs that have been paths ---


def test_a_path_of_a_url_is_that_url(stored_source: str, stored: str, store: ObjectStore, out: Path) -> None:
    """A Path takes one of a URL's two slashes."""
    assert str(Path(stored)) == stored.replace("//", "/")
    reshard.convert(Path(stored_source), out, tp_size=2)
    assert reshard.inspect(Path(stored)).world_size == 2
    reshard.merge(Path(stored), Path("s3://bucket/merged"))
    assert "config.json" in store.objects("merged")
    assert reshard.verify(out, against=Path(stored_source)).elements
    inside = out.parent / "there" / "s3:" / "bucket"  # a folder of this machine
    reshard.convert(stored_source, inside, tp_size=2)
    assert (inside / "reshard.json").exists()


@pytest.mark.parametrize("make", [str, Path])
def test_a_url_where_only_a_folder_will_do(
    make: Callable[[str], object], resharded: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error shows the URL as given, and nothing is created on this machine."""
    monkeypatch.chdir(out.parent)
    url: Any = make("s3://bucket/x")
    found = find_resharded(str(resharded))
    monkeypatch.setattr("reshard.operations.pull.find_resharded", lambda *_, **__: found)
    for call in (
        lambda: reshard.verify(url),
        lambda: reshard.publish(url, "org/model"),
        lambda: reshard.pull("org/model", to=url),
        lambda: local_folder(url),
    ):
        with pytest.raises(UsageError, match=r"^s3://bucket/x: is not on this machine") as refused:
            call()
        assert "reshard pull" in str(refused.value.hint)
    assert not any(path.name.startswith("s3") for path in Path().iterdir())


def test_verify_and_publish_name_a_url_as_it_was_given(refused: Refused) -> None:
    for command in (["verify", "s3://bucket/x"], ["publish", "s3://bucket/x", "org/model"]):
        refused(2, command, "s3://bucket/x: is not on this machine", hint="reshard pull")


# --- revisions ---


def test_a_url_has_no_revision(store: ObjectStore, stored_source: str, stored: str, out: Path, cli: Cli) -> None:
    for command in (
        convert(stored_source, out),
        ["plan", stored_source, "-tp", 2],
        ["pull", stored],
        ["merge", stored, out],
    ):
        for revision in ("main", "3f" * 20):
            result = cli(*command, "--revision", revision)
            assert_one_error(result, 2, f"a URL has no revision {revision}", hint="leave out --revision")
    assert not out.exists()


def test_a_folder_has_no_revision(source: Path, resharded: Path, out: Path, cli: Cli) -> None:
    for command in (
        convert(source, out),
        ["plan", source, "-tp", 2],
        ["inspect", resharded],
        ["merge", resharded, out],
    ):
        assert_one_error(cli(*command, "--revision", "main"), 2, "has no revisions", hint="leave out --revision")
    assert_one_error(cli("verify", resharded, "--revision", "main"), 2, "of the source", hint="--against")
    verify = ["verify", resharded, "--against", source]
    assert_one_error(cli(*verify, "--revision", "main"), 2, "has no revisions")
    assert not out.exists()


# --- secrets ---

SECRETS = [
    "sig=s3cret",
    "a=b&X-Amz-Signature=s3cret&c=d",
    "AWSAccessKeyId=s3cret",
    "access_token=s3cret",
    "pass=s3cret#x",
]


@pytest.mark.fault(27)
@pytest.mark.parametrize("query", SECRETS)
def test_a_secret_in_a_url_is_not_told(query: str, cli: Cli, source: Path) -> None:
    for command in (["plan", f"nosuch://host/x?{query}", "-tp", 2], convert(source, f"nosuch://host/x?{query}")):
        result = cli(*command)
        assert_one_error(result, 2, query.replace("s3cret", "…"))
        assert "s3cret" not in result.out + result.err


@pytest.mark.fault(27)
def test_nor_in_json(source: Path, resharded: Path, cli: Cli) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    for number, command in enumerate((["convert", source], ["merge", resharded])):
        sizes = ["--tp-size", 2] if number == 0 else []
        result = cli(*command, f"memory://out-{number}?sig=s3cret", *sizes, "--format", "json")
        assert result.code == 0, result
        assert f"memory://out-{number}?sig=\\u2026" in result.out
        assert "s3cret" not in result.out + result.err
        MemoryFileSystem().rm(f"/out-{number}?sig=s3cret", recursive=True)


def test_an_address_keeps_what_is_no_secret() -> None:
    from reshard.text import printable, without_secrets

    for text in ("https://host/x?page=2&version=1", "/here/a?token=x", "s3://bucket/key?versionId=3#secret=1"):
        assert without_secrets(text) == text
        assert printable(text) == text

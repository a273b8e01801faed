"""Publications beside each other and beside other files: one card, one licence, and nothing is lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub import FakeHub
from object_store import contents

import reshard
from reshard.errors import BadInputError, DestinationExistsError, PolicyError


@pytest.fixture
def other(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder made from another source, on two ranks."""
    reshard.convert(checkpoint("phi3"), tmp_path / "other", tp_size=2)
    return tmp_path / "other"


@pytest.fixture
def wider(resharded: Path, tmp_path: Path) -> Path:
    """A folder made from `resharded`, on four ranks."""
    reshard.convert(resharded, tmp_path / "wider", tp_size=4)
    return tmp_path / "wider"


def front_matter(hub: FakeHub, name: str = "org/model") -> dict[str, object]:
    from huggingface_hub import ModelCard

    return ModelCard(hub.repos[name].files["README.md"].decode()).data.to_dict()


def of_hub(folder: Path, repo_id: str) -> None:
    """Name this repo as the source in a folder's manifest."""
    manifest = dataclasses.replace(reshard.inspect(folder), repo_id=repo_id, commit="0" * 40)
    (folder / "reshard.json").write_bytes(manifest.to_bytes())


def test_a_later_degree_keeps_the_licence(here: FakeHub, resharded: Path, wider: Path) -> None:
    reshard.publish(resharded, "org/model/tp2", licence="mit", private=True)
    assert reshard.publish(wider, "org/model/tp4", private=True).licence == "mit"
    assert front_matter(here)["license"] == "mit"
    assert "Licence: `mit`." in here.repos["org/model"].files["README.md"].decode()
    assert front_matter(here)["tags"] == ["reshard", "tensor-parallel", "tp2", "tp4"]
    again = reshard.publish(resharded, "org/model/tp2", private=True)
    assert again.licence == "mit"
    assert again.commit == here.repos["org/model"].revisions["main"]


def test_what_belongs_to_a_licence_is_kept_with_it(here: FakeHub, resharded: Path, wider: Path) -> None:
    """The source states the licence at first, and cannot be asked the next time."""
    says = b"---\nlicense: other\nlicense_name: tongyi\nlicense_link: LICENSE\npipeline_tag: text-to-image\n---\n"
    here.create("org/source", {"README.md": says})
    of_hub(wider, "org/source")
    reshard.publish(wider, "org/model/tp4", private=True)
    before = front_matter(here)
    assert before["license_name"] == "tongyi"
    del here.repos["org/source"]
    reshard.publish(wider, "org/model/tp4-again", private=True)
    assert {**front_matter(here), "tags": 0} == {**before, "tags": 0}


def test_a_word_about_the_same_source_is_the_last_one(here: FakeHub, resharded: Path, wider: Path) -> None:
    reshard.publish(resharded, "org/model/tp2", licence="mit", private=True)
    reshard.publish(wider, "org/model/tp4", licence="apache-2.0", private=True)
    assert front_matter(here)["license"] == "apache-2.0"


@pytest.mark.parametrize("licence", [None, "apache-2.0"])
def test_other_sources_under_another_licence(licence: str | None, here: FakeHub, resharded: Path, other: Path) -> None:
    """One card would state a wrong licence for one of the sources."""
    reshard.publish(resharded, "org/model/tp2", licence="mit", private=True)
    commits = len(here.repos["org/model"].commits)
    with pytest.raises(PolicyError, match="states the licence mit for models of other sources") as refused:
        reshard.publish(other, "org/model/other", licence=licence, private=True)
    assert "--license mit" in str(refused.value.hint)
    assert len(here.repos["org/model"].commits) == commits
    reshard.publish(other, "org/model/other", licence="mit", private=True)
    assert front_matter(here)["license"] == "mit"


def test_in_the_place_of_another_source_its_licence_goes(here: FakeHub, resharded: Path, other: Path) -> None:
    reshard.publish(resharded, "org/model", licence="mit", private=True)
    assert reshard.publish(other, "org/model", private=True).licence is None
    assert "license" not in front_matter(here)


def test_a_card_that_cannot_be_read(here: FakeHub, resharded: Path, wider: Path) -> None:
    reshard.publish(resharded, "org/model/tp2", licence="mit", private=True)
    repo = here.repos["org/model"]
    repo.commit({"README.md": repo.files["README.md"].replace(b"license: mit", b"license: {[")})
    with pytest.raises(BadInputError, match="front matter cannot be read"):
        reshard.publish(wider, "org/model/tp4", private=True)


@pytest.mark.parametrize(
    "name", ["model.gguf", "a.PT", "a.pth", "a.ckpt", "tf_model.h5", "flax_model.msgpack", "a.onnx", "a.bin"]
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_other_weights(name: str, dry_run: bool, here: FakeHub, resharded: Path) -> None:
    repo = here.create("org/model", {name: b"weights"}, token="hf_test")
    with pytest.raises(DestinationExistsError, match="holds other weights"):
        reshard.publish(resharded, "org/model", private=True, dry_run=dry_run)
    assert repo.files == {name: b"weights"}


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("path", ["", "tp2/"])
def test_other_files_are_not_replaced(path: str, dry_run: bool, here: FakeHub, resharded: Path) -> None:
    """Other files stop the publication; equal files and those of an earlier publication do not."""
    files = contents(resharded)
    same, another = f"{path}generation_config.json", f"{path}config.json"
    repo = here.create("org/model", {same: files["generation_config.json"], another: b"{}"}, token="hf_test")
    place = f"org/model/{path}".rstrip("/")
    with pytest.raises(DestinationExistsError, match=f"other files of these names: {another}\n") as refused:
        reshard.publish(resharded, place, private=True, dry_run=dry_run)
    assert ("remove them there" if path else "org/model/tp2") in str(refused.value.hint)
    assert repo.files[another] == b"{}"
    assert len(repo.commits) == 1
    repo.commit({}, deleted=[another])
    reshard.publish(resharded, place, private=True)
    assert {name.removeprefix(path) for name in repo.files} >= files.keys()
    reshard.publish(resharded, place, private=True)

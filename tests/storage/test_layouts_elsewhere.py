"""Layouts of checkpoints on the Hub and in an object store: found, fetched, and written back as for a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_tools import (
    FIRST,
    INDEX,
    RANK_FILES,
    Checkpoint,
    Cli,
    assert_one_error,
    configure,
    convert,
    rewrite,
    single_file,
)
from fake_hub import FakeHub
from layout_tools import NORM, ODD, PLACES, SINGLE, weights_in
from object_store import ObjectStore
from safetensors.torch import load_file

import reshard

Put = Callable[[Path], str]


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder, by path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(params=["hub", "store"])
def put(request: pytest.FixtureRequest) -> Put:
    """`put(folder)`: upload it and return its address."""
    if request.param == "store":
        store: ObjectStore = request.getfixturevalue("store")
        return lambda folder: store.put("odd", contents(folder))
    here: FakeHub = request.getfixturevalue("here")

    def publish(folder: Path) -> str:
        here.create("org/odd", contents(folder))
        return "org/odd"

    return publish


def assert_converts(place: str, out: Path, local: Path, weights: str | None) -> reshard.ReshardPlan:
    """Check that the conversion equals that of a local folder, and that merge restores the files."""
    planned = reshard.plan(place, tp_size=2, weights=weights)
    reshard.convert(place, out, tp_size=2, weights=weights, sync=False)
    for name in RANK_FILES:
        assert (out / name).read_bytes() == (local / name).read_bytes()
    assert reshard.verify(out, against=place, weights=weights).elements
    return planned


@pytest.mark.parametrize(
    "case",
    ["the index names a subfolder", "the index is in the subfolder", "a variant of several files",
     "one file of another name", "config.json names an index"],
)  # fmt: skip
def test_weights_elsewhere(case: str, put: Put, source: Path, out: Path, resharded: Path) -> None:
    make, weights, _ = PLACES[case]
    make(source)
    assert_converts(put(source), out, resharded, weights)
    reshard.merge(out, out.with_name("merged"), sync=False)
    assert weights_in(out.with_name("merged")) == weights_in(source)


@pytest.mark.parametrize("case", ["an entry too many", "a tensor twice", "a stale index"])
def test_an_index_at_odds_with_its_files(case: str, put: Put, source: Path, out: Path, resharded: Path) -> None:
    spoil, said = ODD[case]
    spoil(source)
    planned = assert_converts(put(source), out, resharded, None)
    assert any(said in note for note in planned.notes), planned.notes


def test_copies_of_a_tensor_are_compared_by_ranges(put: Put, source: Path, out: Path, cli: Cli) -> None:
    ODD["a tensor twice"][0](source)
    copies = [path for path in sorted(source.glob("model-*")) if NORM in load_file(path)]
    rewrite(copies[1], lambda tensors: tensors[NORM][-1:].add_(1))
    said = f"{NORM} ({copies[0].name}, {copies[1].name})"
    assert_one_error(cli("plan", put(source), "--tp-size", 2), 3, "with other bytes in each", said)


def test_one_file_beside_an_index_is_all_that_is_fetched(put: Put, source: Path, out: Path, cli: Cli) -> None:
    whole = single_file(Path(shutil.copytree(source, source.with_name("whole"))))
    shutil.copy(whole / SINGLE, source)
    planned = reshard.plan(put(source), tp_size=2)
    assert [file.name for file in planned.source.files] == [SINGLE]
    assert f"{SINGLE} is taken, as transformers does, and {INDEX} is not" in planned.notes


def test_what_there_is_instead(put: Put, source: Path, out: Path, cli: Cli) -> None:
    PLACES["one file of a variant"][0](source)
    place = put(source)
    assert_one_error(cli(*convert(place, out)), 3, place, "model.fp16.safetensors", hint="--weights fp16")
    assert cli(*convert(place, out, "--weights", "fp16")).code == 0


def test_an_adapter_alone(put: Put, source: Path, out: Path, cli: Cli) -> None:
    for path in [*source.glob("model*"), source / "config.json"]:
        path.unlink()
    (source / "adapter_config.json").write_text("{}")
    (source / "adapter_model.safetensors").write_bytes(b"")
    place = put(source)
    assert_one_error(cli(*convert(place, out)), 3, place, "an adapter", hint="merge it into its base model")


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid x\n", b"<html></html>"])
def test_a_pointer_there_is_called_that(content: bytes, put: Put, source: Path, out: Path, cli: Cli) -> None:
    (source / FIRST).write_bytes(content)
    assert_one_error(cli(*convert(put(source), out)), 3, FIRST, "is a")


def test_a_merge_into_a_store_has_its_folders(store: ObjectStore, source: Path, out: Path) -> None:
    PLACES["the index names a subfolder"][0](source)
    reshard.convert(source, out, tp_size=2, sync=False)
    url = store.put("x", {}) + "/merged"
    reshard.merge(out, url)
    found = store.objects("x/merged")
    assert {name: found[name] for name in found if name.endswith(".safetensors")} == {
        name: data for name, data in contents(source).items() if name.endswith(".safetensors")
    }
    assert INDEX in found
    reshard.convert(url, out.with_name("again"), tp_size=2, sync=False)
    assert (out.with_name("again") / RANK_FILES[0]).read_bytes() == (out / RANK_FILES[0]).read_bytes()


def test_a_merge_into_a_store_of_weights_that_the_configuration_names(
    store: ObjectStore, source: Path, out: Path
) -> None:
    (single_file(source) / SINGLE).rename(source / "special.safetensors")
    configure(source, transformers_weights="special.safetensors")
    reshard.convert(source, out, tp_size=2, sync=False)
    reshard.merge(out, store.put("x", {}) + "/merged")
    assert store.objects("x/merged")["special.safetensors"] == (source / "special.safetensors").read_bytes()


def test_pull_makes_the_folders_above(here: FakeHub, checkpoint: Checkpoint, tmp_path: Path, cli: Cli) -> None:
    here.create("org/none", {"config.json": b"{}"})
    target = tmp_path / "a" / "b"
    assert cli("pull", "org/none", "--to", target).code == 3
    assert not target.parent.exists()
    reshard.convert(checkpoint("llama"), tmp_path / "tp1", tp_size=1, sync=False)
    here.create("org/tp1", contents(tmp_path / "tp1"))
    assert cli("pull", "org/tp1", "--to", target).code == 0
    assert cli("verify", target).code == 0

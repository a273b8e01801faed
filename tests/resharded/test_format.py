"""A format that can grow: readers refuse and name unknown parts, and folders without new features are as before."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import old_reader
import pico
import pytest
from cli_tools import reseal, tree
from golden import FOLDERS
from jsonschema import Draft202012Validator
from places import DATA

import reshard
from reshard.checkpoint.source import MANIFEST_NAME
from reshard.errors import IntegrityError, VersionError
from reshard.resharded import versions
from reshard.resharded.manifest import Manifest, read_manifest
from reshard.resharded.versions import CLOSED, FEATURES, OPEN, version_members

SCHEMA = json.loads((files("reshard") / "manifest.schema.json").read_text())
CHECK = Draft202012Validator(SCHEMA)
FAMILIES = {"mixtral": {"tp_size": 2}, "gemma2": {"tp_size": 2, "dtype": "bfloat16"}, "qwen3_moe": {"tp_size": 4}}


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "golden-2.0", tmp_path / "golden"))


def content_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_bytes())
    return content


# --- the reader ---


def twisted(content: dict[str, Any]) -> None:
    content["parameters"][0]["placement"] = {"type": "twist", "turns": 3}


def unit(content: dict[str, Any]) -> None:
    cut = next(p for p in content["parameters"] if p["placement"]["type"] == "shard")
    cut["placement"]["unit"] = 8


def within(content: dict[str, Any]) -> None:
    nested = next(p for p in content["parameters"] if p["placement"]["type"] == "nested")
    nested["placement"]["outer"]["unit"] = 8


# Unknown parts of any version that decide which part a rank holds.
CUTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a placement": (twisted, "a placement twist"),
    "a placement's member": (unit, "a placement shard with unit"),
    "one within another": (within, "a placement shard with unit"),
    "an axis of the mesh": (lambda content: content["mesh"].update(pp=2), "a mesh axis pp"),
}
# Unknown members of 2.x, where a reader may pass over none.
MEMBERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "of the manifest": (lambda content: content.update(zooms=[]), "has zooms"),
    "requires": (lambda content: content.update(requires=[]), "has requires"),
    "of the model": (lambda content: content["model"].update(heads=4), "has model.heads"),
    "of the source": (lambda content: content["source"].update(etag="x"), "has source.etag"),
    "of a source file": (lambda content: content["source"]["files"][-1].update(part=1), "has source.files.part"),
    "of a parameter": (lambda content: content["parameters"][-1].update(bundle="b"), "has parameters.bundle"),
    "of a rank file": (lambda content: content["ranks"][1].update(blocks=[]), "has ranks.blocks"),
    "of the unused file": (lambda content: content["unused"].update(blocks=[]), "has unused.blocks"),
    "of a copied file": (lambda content: content["extras"][0].update(kind="x"), "has extras.kind"),
}


def version(name: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["format_version"] = name
        if name.startswith("3"):
            content.setdefault("requires", [])

    return change


@pytest.mark.fault(23)
@pytest.mark.parametrize("number", ["2.0", "2.1", "3.0", "3.9"])
@pytest.mark.parametrize("what", CUTS)
def test_a_cut_that_is_not_known_is_refused_in_every_version(what: str, number: str, golden: Path) -> None:
    change, words = CUTS[what]
    reseal(golden, lambda content: (version(number)(content), change(content)))
    with pytest.raises(VersionError, match=rf"format version {number} has {words}, which this release") as caught:
        read_manifest(golden)
    assert caught.value.hint == "upgrade reshard"


@pytest.mark.fault(23)
@pytest.mark.parametrize("number", ["2.0", "2.1"])
@pytest.mark.parametrize("what", MEMBERS)
def test_of_2_every_other_member_is_refused(what: str, number: str, golden: Path) -> None:
    change, words = MEMBERS[what]
    reseal(golden, lambda content: (version(number)(content), change(content)))
    with pytest.raises(VersionError, match=rf"format version {number} {words}, which this release"):
        read_manifest(golden)


@pytest.mark.parametrize("what", [what for what in MEMBERS if what != "requires"])
def test_of_3_only_what_is_required(what: str, golden: Path) -> None:
    before = read_manifest(golden)
    reseal(golden, lambda content: (version("3.0")(content), MEMBERS[what][0](content)))
    assert read_manifest(golden) == before
    reseal(golden, lambda content: content.update(requires=["zoom", "halves", "cuts"]))
    with pytest.raises(VersionError, match=r"format version 3\.0 needs halves, zoom, which this release"):
        read_manifest(golden)


@pytest.mark.parametrize("requires", [None, "cuts", [1], {}, [None]])
def test_what_is_required_is_a_list_of_names(requires: Any, golden: Path) -> None:
    reseal(golden, lambda content: content.update(format_version="3.0", requires=requires))
    with pytest.raises(IntegrityError, match="incomplete or malformed"):
        read_manifest(golden)


def test_an_altered_manifest_is_no_newer_one(golden: Path) -> None:
    text = (
        (golden / MANIFEST_NAME).read_text().replace('"format_version": "2.0",', '"format_version": "2.0",\n"new": 1,')
    )
    (golden / MANIFEST_NAME).write_text(text)
    with pytest.raises(IntegrityError, match="does not match its seal"):
        read_manifest(golden)


# --- the writer ---


def test_what_needs_nothing_new_is_written_as_before(golden: Path) -> None:
    assert read_manifest(golden).to_bytes() == (golden / MANIFEST_NAME).read_bytes()
    assert version_members(read_manifest(golden)) == {"format_version": CLOSED}


def test_a_feature_adds_its_name_in_one_place(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer derives the features from the content; a release without the name refuses the folder."""
    manifest = read_manifest(golden)

    def has_unused(manifest: Manifest) -> bool:
        return manifest.unused_file is not None

    with monkeypatch.context() as patch:
        for name in ("zoom", "remains"):
            patch.setitem(FEATURES, name, has_unused)
        patch.setitem(FEATURES, "halves", lambda _: False)
        (golden / MANIFEST_NAME).write_bytes(manifest.to_bytes())
        content = content_of(golden)
        assert (content["format_version"], content["requires"]) == (OPEN, ["remains", "zoom"])
        assert read_manifest(golden) == manifest
        CHECK.validate(content)
    with pytest.raises(VersionError, match="needs remains, zoom"):
        read_manifest(golden)
    assert old_reader.read("2.0", golden)[0] == 8


# --- the reader that was released ---


@pytest.mark.fault(23)
def test_the_released_reader_refuses_3(golden: Path) -> None:
    assert old_reader.read("2.0", golden) == (0, "Qwen3MoeForCausalLM\n")
    reseal(golden, lambda content: content.update(format_version="3.0", requires=["cuts"]))
    code, line = old_reader.read("2.0", golden)
    assert code == 8, line
    assert "format version 3.0, this release reads 2.0" in line


def test_the_released_reader_reads_what_is_written_now(tmp_path: Path) -> None:
    pico.save("mixtral", tmp_path / "source", num_hidden_layers=1)
    reshard.convert(tmp_path / "source", tmp_path / "out", tp_size=2)
    assert old_reader.read("2.0", tmp_path / "out") == (0, "MixtralForCausalLM\n")


@pytest.mark.fault(23)
def test_an_older_release_refuses_uneven_heads(tmp_path: Path) -> None:
    source = pico.save("llama", tmp_path / "source")  # 4 KV heads
    manifest = reshard.convert(source, tmp_path / "out", tp_size=3)
    content = content_of(tmp_path / "out")
    assert (content["format_version"], content["requires"]) == ("3.0", ["cuts"])
    assert read_manifest(tmp_path / "out") == manifest
    CHECK.validate(content)
    code, line = old_reader.read("2.0", tmp_path / "out")
    assert code == 8
    assert "format version 3.0" in line


# --- the schema ---


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", FOLDERS)
def test_golden_folders_fit_the_schema(name: str) -> None:
    CHECK.validate(content_of(DATA / f"golden-{name}"))


@pytest.fixture(scope="module", params=FAMILIES)
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp(request.param)
    pico.save(request.param, root / "source", num_hidden_layers=1, num_key_value_heads=2)
    reshard.convert(root / "source", root / "out", **FAMILIES[request.param])
    return content_of(root / "out")


def test_fresh_folders_fit_the_schema(fresh: dict[str, Any]) -> None:
    CHECK.validate(fresh)
    CHECK.validate({**fresh, "format_version": "3.0", "requires": ["cuts"], "cuts": []})


def test_an_explicit_placement_fits_the_schema() -> None:
    from reshard.resharded.placement_json import Cuts, placement_to_json
    from reshard.sharding.placement import Explicit, Piece

    placement = Explicit(((2, 3), (0, 3)), ((Piece((0, 0), (2, 3), (0, 0)),), ()))
    content = content_of(DATA / "golden-2.0")
    content["parameters"][0]["placement"] = json.loads(json.dumps(placement_to_json(placement, Cuts())))
    CHECK.validate(content)


@pytest.mark.parametrize("what", {**CUTS, **MEMBERS})
def test_the_schema_knows_no_more_than_the_reader(what: str) -> None:
    content = content_of(DATA / "golden-2.0")
    {**CUTS, **MEMBERS}[what][0](content)
    assert not CHECK.is_valid(content)
    version("3.0")(content)
    assert CHECK.is_valid(content) == (what in MEMBERS)


def test_nor_does_it_want_less(fresh: dict[str, Any]) -> None:
    """The schema needs every member that the reader needs."""
    content = copy.deepcopy(fresh)
    optional = {"tensors", "compute_dtype", "reason", "ep"}
    places = [content, *(content[name] for name in ("model", "source", "mesh")), content["source"]["files"][0]]
    places += [content["parameters"][0], content["parameters"][0]["placement"], content["ranks"][0]]
    for place in places:
        for key in set(place) - optional:
            kept = place.pop(key)
            assert not CHECK.is_valid(content), key
            place[key] = kept
    CHECK.validate(content)


def test_the_members_are_those_of_the_schema() -> None:
    """The schema is for any tool, and the reader's list costs it nothing: both have the same members."""
    defined = SCHEMA["$defs"]
    where = {
        (): "manifest",
        ("model",): "model",
        ("source",): "source",
        ("source", "files"): "source_file",
        ("parameters",): "parameter",
        **dict.fromkeys([("ranks",), ("unused",), ("extras",)], "file"),
    }
    assert {way: set(defined[name]["properties"]) for way, name in where.items()} == versions._MEMBERS
    assert set(defined["mesh"]["properties"]) == versions._AXES


# --- very many tensors ---


@pytest.fixture
def named(golden: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The golden folder, with a manifest that has the names of tensors in a table."""
    manifest = read_manifest(golden)
    monkeypatch.setattr(versions, "MANY", 0)
    (golden / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return golden


def test_the_names_of_very_many_tensors_are_in_a_table(named: Path) -> None:
    content = content_of(named)
    CHECK.validate(content)
    assert (content["format_version"], content["requires"]) == (OPEN, ["names"])
    assert [sorted(rank) for rank in content["ranks"]] == [["digest", "digests", "file", "names", "size"]] * 2
    found, before = read_manifest(named), read_manifest(DATA / "golden-2.0")
    assert found == before
    assert before == found
    assert [dict(record.tensors) for record in found.rank_files] == [record.tensors for record in before.rank_files]
    assert found.to_bytes() == (named / MANIFEST_NAME).read_bytes()
    assert reshard.verify(named) == reshard.verify(DATA / "golden-2.0")
    assert old_reader.read("2.0", named)[0] == 8


def test_ranks_with_the_same_tensors_share_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "MANY", 100)
    source = pico.save("llama", tmp_path / "source")
    plain = reshard.convert(source, tmp_path / "plain", tp_size=2)
    assert sum(len(record.tensors) for record in plain.rank_files) <= 100
    manifest = reshard.convert(source, tmp_path / "out", tp_size=8)
    content = content_of(tmp_path / "out")
    assert [rank["names"] for rank in content["ranks"]] == [0] * 8
    assert content["names"] == [list(manifest.rank_files[0].tensors)]
    assert reshard.verify(tmp_path / "out", against=source).elements
    for number in (2, 1):
        reshard.convert_part(source, tmp_path / "parts", part=f"{number}/2", tp_size=8)
    reshard.finish(tmp_path / "parts")
    assert tree(tmp_path / "parts") == tree(tmp_path / "out")
    reshard.convert(tmp_path / "out", tmp_path / "again", tp_size=2)
    assert tree(tmp_path / "again") == tree(tmp_path / "plain")
    reshard.merge(tmp_path / "out", tmp_path / "merged")
    for path in source.glob("*.safetensors"):
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()


def shortened(digits: int) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["ranks"][1]["digests"] = content["ranks"][1]["digests"][digits:]

    return change


TABLES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another number of digests": shortened(32),
    "half a digest": shortened(16),
    "no digests": lambda content: content["ranks"][1].pop("digests"),
    "digests that are no text": lambda content: content["ranks"][1].update(digests=[]),
    "no such names": lambda content: content["ranks"][1].update(names=7),
    "names before the first": lambda content: content["ranks"][1].update(names=-1),
    "a name twice": lambda content: content["names"][0].__setitem__(0, content["names"][0][1]),
    "a name that is no text": lambda content: content["names"][0].__setitem__(0, 1),
    "no table": lambda content: content.update(names=None),
}


@pytest.mark.parametrize("what", TABLES)
def test_a_table_of_names_that_makes_no_sense(what: str, named: Path) -> None:
    reseal(named, TABLES[what])
    with pytest.raises(IntegrityError, match="incomplete or malformed"):
        read_manifest(named)


def test_names_of_other_tensors_are_found_when_the_file_is_checked(named: Path) -> None:
    reseal(named, lambda content: content["names"][0].__setitem__(0, "another"))
    with pytest.raises(IntegrityError, match="does not hold the tensors that were written"):
        reshard.verify(named)

"""`reshard.json`: read back as written, and never believed if it is altered, newer or incomplete."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pico
import pytest

import reshard
from reshard.checkpoint.source import MANIFEST_NAME
from reshard.errors import BadInputError, IntegrityError, ReshardError, VersionError
from reshard.resharded.manifest import Manifest, read_manifest, sealed_text
from reshard.resharded.placement_json import Cuts, placement_from_json, placement_to_json
from reshard.sharding.placement import Explicit, Nested, PackedShard, Piece, Placement, Ranges, Replicate, Shard

FLIPS = 300


@pytest.fixture(scope="module", params=["mixtral", "gemma2"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path]:
    root = tmp_path_factory.mktemp(request.param)
    source = pico.save(request.param, root / "source", num_hidden_layers=1)
    return reshard.convert(source, root / "out", tp_size=2), root / "out"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The content of a small manifest."""
    root = tmp_path_factory.mktemp("small")
    source = pico.save("gemma2", root / "source", num_hidden_layers=1)
    reshard.convert(source, root / "out", tp_size=2)
    return json.loads((root / "out" / MANIFEST_NAME).read_bytes())


def sealed(content: dict[str, Any]) -> bytes:
    """Return the content with a valid seal, as deliberate tampering would produce it."""
    return sealed_text({key: value for key, value in content.items() if key != "seal"})


def read(folder: Path, data: bytes) -> Manifest:
    (folder / MANIFEST_NAME).write_bytes(data)
    return read_manifest(folder)


def test_round_trip(converted: tuple[Manifest, Path]) -> None:
    manifest, folder = converted
    found = read_manifest(folder)
    assert found == manifest
    assert found.to_bytes() == manifest.to_bytes() == (folder / MANIFEST_NAME).read_bytes()


def test_round_trip_of_shared_heads(tmp_path: Path) -> None:
    source = pico.save("llama", tmp_path / "source", num_key_value_heads=2, num_hidden_layers=1)
    manifest = reshard.convert(source, tmp_path / "out", tp_size=4)
    assert read_manifest(tmp_path / "out") == manifest
    placements = {p.name.split(".")[-2]: p.placement for p in manifest.parameters if "self_attn" in p.name}
    assert placements == {
        "q_proj": Shard(0),
        "k_proj": Nested(Shard(0), Replicate(), 2),
        "v_proj": Nested(Shard(0), Replicate(), 2),
        "o_proj": Shard(1),
    }
    reshard.verify(tmp_path / "out", against=source)


_CUT = {"type": "shard", "dim": 0}
_WHOLE = {"type": "replicate"}
_NESTED = {"type": "nested", "outer": _CUT, "inner": _WHOLE, "row": 2}


@pytest.mark.parametrize(
    "placement",
    [
        {"type": "shard", "dim": 9},
        {"type": "shard", "dim": -1},
        {"type": "packed", "dim": 0, "blocks": [1, 1]},
        *({"type": "nested", "outer": _CUT, "inner": _WHOLE, "row": row} for row in (0, 1, 3, -1, "2", None)),
        {"type": "nested", "outer": _WHOLE, "inner": _CUT, "row": 2},
        {
            "type": "nested",
            "outer": _CUT,
            "inner": {"type": "nested", "outer": _CUT, "inner": _WHOLE, "row": 2},
            "row": 2,
        },
        {"type": "nested", "outer": _CUT, "inner": {"type": "packed", "dim": 1, "blocks": [1]}, "row": 2},
        {"type": "explicit", "shapes": [[1, 1]], "boxes": [[]]},  # boxes for one rank of two
        {
            "type": "explicit",
            "shapes": [[1, 1]] * 2,
            "boxes": [[[[0, 0], [2, 1], [0, 0]]], []],
        },  # past its tensor's end
        {"type": "explicit", "shapes": [[1, 1]] * 2, "boxes": [[[[10**9, 0], [1, 1], [0, 0]]], []]},
        {"type": "explicit", "shapes": [[1]] * 2, "boxes": [[[[0], [1], [0]]], []]},  # another number of dims
        {"type": "explicit", "shapes": [[2, 1]] * 2, "boxes": [[[[0, 0], [1, 1], [0, 0]]], []]},  # not filled
        {"type": 3},
    ],
)
def test_placements_that_cannot_be(content: dict[str, Any], tmp_path: Path, placement: Any) -> None:
    altered = copy.deepcopy(content)
    sharded = next(p for p in altered["parameters"] if p["placement"]["type"] == "shard" and len(p["shape"]) == 2)
    sharded["placement"] = placement
    with pytest.raises(IntegrityError):
        read(tmp_path, sealed(altered))


@pytest.mark.parametrize(
    "placement",
    [
        Replicate(),
        Shard(1),
        PackedShard(0, (4, 2)),
        Nested(Shard(0), Replicate(), 2),
        Nested(PackedShard(0, (4, 2)), Shard(1), 2),
        Ranges(0, (((0, 2),), ((2, 4),), ((4, 6),), ((4, 6), (0, 2)))),
        Ranges(1, (((0, 1),), ((1, 3),), (), ((0, 0),))),
        Nested(Ranges(0, (((0, 4),), ((4, 6),))), Shard(1), 2),
        Explicit(
            ((2, 3), (0, 3), (0, 3), (2, 3)),
            ((Piece((0, 0), (2, 3), (0, 0)),), (), (), (Piece((4, 0), (2, 3), (0, 0)),)),
        ),
    ],
)
def test_placements_as_json_and_back(placement: Placement) -> None:
    cuts = Cuts()
    text, table = json.dumps(placement_to_json(placement, cuts)), json.dumps(cuts.to_json())
    assert placement_from_json(json.loads(text), (6, 3), 4, Cuts.from_json(json.loads(table))) == placement


CUT = {"ranks": [[[0, 3]], [[3, 4]]]}
RANGES = {"type": "ranges", "dim": 0, "cut": 0, "unit": 8}


def with_cut(content: dict[str, Any], table: Any, placement: Any) -> bytes:
    altered = copy.deepcopy(content)
    parameter = next(p for p in altered["parameters"] if p["name"].endswith("k_proj.weight"))
    assert parameter["shape"] == [32, 32]
    parameter["placement"] = placement
    return sealed({**altered, "format_version": "3.0", "requires": ["cuts"], "cuts": table})


def test_cuts_that_can_be(content: dict[str, Any], tmp_path: Path) -> None:
    for ranks in (CUT["ranks"], [[[2, 4], [0, 2]], [[0, 4]]], [[[0, 3], [0, 3]], [[1, 4]]], [[], [[0, 4]]]):
        found = read(tmp_path, with_cut(content, [{"ranks": [[[0, 1]]]}, {"ranks": ranks}], {**RANGES, "cut": 1}))
        (placement,) = [p.placement for p in found.parameters if isinstance(p.placement, Ranges)]
        assert placement == Ranges(0, tuple(tuple((8 * a, 8 * b) for a, b in held) for held in ranks))
        assert sealed(json.loads(found.to_bytes())) == found.to_bytes()
    twice = [{"ranks": [[[0, 1]], [[1, 2]]]}] * 2  # numbers count all entries, equal ones too
    found = read(tmp_path, with_cut(content, [*twice, CUT], {**RANGES, "cut": 2}))
    assert Ranges(0, (((0, 24),), ((24, 32),))) in [p.placement for p in found.parameters]


@pytest.mark.parametrize(
    ("table", "placement"),
    [
        *(([CUT], {**RANGES, "dim": dim}) for dim in (2, -1, None)),
        *(([CUT], {**RANGES, "cut": number}) for number in (1, -1, "0")),
        *(([CUT], {**RANGES, "unit": unit}) for unit in (7, 9, 0, -8, None)),
        *(
            ([{"ranks": ranks}], RANGES)
            for ranks in (
                [[[0, 4]]],  # for one rank
                [[[0, 3]], [[3, 4]], []],  # for three
                [[[0, 1]], [[2, 4]]],  # a hole
                [[[1, 2]], [[2, 4]]],  # the beginning is missing
                [[[2, 0]], [[0, 4]]],
                [[[-1, 3]], [[3, 4]]],
                [[[0, 3, 4]], [[3, 4]]],
                [[0, 3], [3, 4]],
                None,
            )
        ),
        *((table, RANGES) for table in ({}, None, [{}], [[]], "")),
    ],
)
def test_cuts_that_cannot_be(content: dict[str, Any], table: Any, placement: Any, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError):
        read(tmp_path, with_cut(content, table, placement))


def test_a_cut_that_says_more_than_we_know(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(VersionError, match="has a cut with order"):
        read(tmp_path, with_cut(content, [{**CUT, "order": [1, 0]}], RANGES))


@pytest.mark.parametrize("groups", [{"a": [2]}, {"a": [2, 0]}, {"a": [2, -1]}, {"a": 2}, {"a": [2, "2"]}, ["a"], 3])
def test_groups_that_cannot_be(content: dict[str, Any], groups: Any, tmp_path: Path) -> None:
    newer = {**content, "format_version": "3.0", "requires": [], "key_value_groups": groups}
    with pytest.raises(IntegrityError):
        read(tmp_path, sealed(newer))


@pytest.mark.parametrize(
    "mesh", [{}, {"tp": 0}, {"tp": 3}, {"tp": 2, "ep": 3}, {"tp": 2, "ep": 4}, {"tp": "2"}, None, []]
)
def test_meshes_that_cannot_be(content: dict[str, Any], tmp_path: Path, mesh: Any) -> None:
    with pytest.raises(IntegrityError):
        read(tmp_path, sealed({**content, "mesh": mesh}))


def test_manifests_here_hold_every_kind_of_record(converted: tuple[Manifest, Path]) -> None:
    """The manifests hold every kind of record, so the round trip means something."""
    manifest, folder = converted
    assert manifest.world_size == len(manifest.rank_files) == 2
    assert {type(parameter.placement) for parameter in manifest.parameters} >= {Shard}
    assert manifest.hooks
    assert manifest.extras
    if manifest.model_type == "mixtral":
        assert any(isinstance(parameter.placement, PackedShard) for parameter in manifest.parameters)
        assert any(len(parameter.regions) > 1 for parameter in manifest.parameters)  # fused experts
    else:
        assert manifest.tied
    present = {path.name for path in folder.iterdir()} - {MANIFEST_NAME}
    assert {record.name for record in manifest.files()} == present


def test_own_seal_is_the_documented_one(content: dict[str, Any], tmp_path: Path) -> None:
    """`sealed` makes the bytes of `to_bytes`, so the tests below fail for their alteration and not for their seal."""
    assert json.loads(sealed(content)) == content
    assert read(tmp_path, sealed(content)).model_type == "gemma2"


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    "version", ["4.0", "1.0", "0.9", "10.0", "20.0", "2", "2.", "2.x", "3.0.0", "", "one", None, 1, 1.0, [1]]
)
def test_another_major_version(content: dict[str, Any], tmp_path: Path, version: Any) -> None:
    with pytest.raises(VersionError) as caught:
        read(tmp_path, sealed({**content, "format_version": version}))
    assert f"format version {version}" in caught.value.message
    assert "reads 2.0 and 3.0" in caught.value.message


def test_no_flipped_bit_is_accepted(converted: tuple[Manifest, Path], tmp_path: Path) -> None:
    """A flip may pass only if the JSON still means the same (white space, the case of a \\u escape)."""
    manifest, folder = converted
    data = (folder / MANIFEST_NAME).read_bytes()
    draw = random.Random(7)
    positions = [
        *range(8 * 60),
        *(draw.randrange(8 * len(data)) for _ in range(FLIPS)),
        *range(8 * (len(data) - 60), 8 * len(data)),
    ]
    for position in positions:
        altered = bytearray(data)
        altered[position // 8] ^= 1 << position % 8
        try:
            found = read(tmp_path, bytes(altered))
        except (IntegrityError, BadInputError, VersionError):
            continue
        assert json.loads(altered) == json.loads(data), f"bit {position}"
        assert found == manifest


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated(converted: tuple[Manifest, Path], tmp_path: Path, share: float) -> None:
    data = (converted[1] / MANIFEST_NAME).read_bytes()
    with pytest.raises(IntegrityError):
        read(tmp_path, data[: int(len(data) * share)])


@pytest.mark.parametrize("data", [b"[]", b"null", b"{}", b'{"format": "other"}', b'"reshard"'])
def test_not_ours(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(IntegrityError, match="not a manifest of ours"):
        read(tmp_path, data)


def test_other_digests_are_of_another_release(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(VersionError, match="digests are sha256"):
        read(tmp_path, sealed({**content, "digest": "sha256"}))


def test_no_folder_and_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no such folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(BadInputError, match=r"holds no reshard\.json"):
        read_manifest(tmp_path)


FIELDS = [
    *(
        "tool",
        "model",
        "mesh",
        "source",
        "parameters",
        "hooks",
        "custom_strategies",
        "tied",
        "duplicates",
        "dropped",
        "runtime_only",
    ),
    *("ranks", "unused", "extras", "seal", "model.architecture", "model.model_type", "model.dtype", "mesh.tp"),
    *("source.repo_id", "source.commit", "source.files"),
    *(f"parameters.0.{name}" for name in ("name", "shape", "dtype", "style", "placement", "from", "placement.type")),
    *(f"ranks.1.{name}" for name in ("file", "size", "digest")),
]


@pytest.mark.parametrize("path", FIELDS)
def test_missing_fields(content: dict[str, Any], tmp_path: Path, path: str) -> None:
    altered = copy.deepcopy(content)
    *parents, last = path.split(".")
    node: Any = altered
    for key in parents:
        node = node[int(key) if key.isdigit() else key]
    del node[last]
    data = json.dumps(altered).encode() if path == "seal" else sealed(altered)
    with pytest.raises(IntegrityError):
        read(tmp_path, data)


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of everything in it, for lists at most three items."""
    keys = list(node) if isinstance(node, dict) else range(min(3, len(node)))
    for key in keys:
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from places(node[key])


@pytest.mark.parametrize("value", [None, "x", -1, [], {}, [[]], True, 1e999], ids=str)
def test_absurd_values_are_told_and_not_a_traceback(content: dict[str, Any], tmp_path: Path, value: Any) -> None:
    """Every field in turn gets another value, and the seal is valid. The manifest is either refused or read."""
    altered = copy.deepcopy(content)
    for container, key in list(places(altered)):
        kept, container[key] = container[key], value
        try:
            read(tmp_path, sealed(altered))
        except ReshardError:
            pass
        finally:
            container[key] = kept

"""`merge` restores the source files byte for byte, whatever was done to their tensors in between."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pico
import pytest
import torch
import transformers
from cli_tools import RANK_FILES, Cli, Refused, configure, reseal
from hypothesis import given, settings
from merge_tools import add, digests
from safetensors.torch import load_file, save_file
from symbolic_programs import programs, run

import reshard
from reshard.errors import BadInputError, DestinationExistsError, IntegrityError, PolicyError, UsageError
from reshard.resharded.manifest import sealed_text
from reshard.sharding.inverse import invert, refined_shape
from reshard.sharding.regions import Region, contiguous_strides
from reshard.strategies.symbolic import RegionTensor


@settings(max_examples=400, deadline=None)
@given(programs())
def test_every_element_goes_back_where_it_came_from(program: tuple[tuple[int, ...], list]) -> None:
    """Against torch: the elements that views and copies took from a tensor are put back, and no others are touched."""
    shape, steps = program
    source = torch.arange(torch.Size(shape).numel()).reshape(shape)
    made, symbolic = source, RegionTensor.of_source("source", shape, torch.int64)
    for step in steps:
        made, symbolic = run(made, step), run(symbolic, step)
    held = made.contiguous().reshape(-1).clone()
    refined = refined_shape(shape, symbolic.regions)
    assert torch.Size(refined).numel() == source.numel()
    again = torch.full((source.numel(),), -1).view(refined)
    for region in symbolic.regions:
        for back in invert(region, "held", tuple(made.shape), refined):
            box = tuple(slice(start, start + extent) for start, extent in zip(back.target_start, back.extent))
            again[box] = torch.as_strided(held, back.extent, back.strides, back.offset)
    expected = torch.where(torch.isin(source, held), source, -1)
    assert torch.equal(again.view(shape), expected)


@pytest.mark.parametrize(
    ("shape", "seen", "refined"),
    [
        ((8, 3), (8, 3), (8, 3)),
        ((8, 3), (2, 4, 3), (2, 4, 3)),
        ((8, 3), (24,), (8, 3)),
        ((3, 4), (2, 6), (3, 4)),  # its dims do not line up with the tensor's
        ((), (), (1,)),
        ((0, 4), (0, 4), (0,)),
    ],
)
def test_refined_shape(shape: tuple[int, ...], seen: tuple[int, ...], refined: tuple[int, ...]) -> None:
    region = Region("source", 0, contiguous_strides(seen), seen, (0,) * len(seen))
    assert refined_shape(shape, [region] if 0 not in seen else []) == refined


def test_a_whole_dim_is_one_region_however_it_was_seen() -> None:
    """Adjacent whole rows of a flattened tensor come back as one box."""
    region = Region("source", 12, (1,), (24,), (0,))
    [back] = invert(region, "held", (24,), (6, 2, 6))
    assert (back.target_start, back.extent) == ((1, 0, 0), (2, 2, 6))


@pytest.mark.parametrize(("family", "ranks"), [*itertools.product(pico.FAMILIES, (1, 2, 4))])
def test_source_files_come_back(family: str, ranks: int, tmp_path: Path) -> None:
    source = pico.save(family, tmp_path / "source")
    reshard.convert(source, tmp_path / "out", tp_size=ranks, sync=False)
    files = reshard.merge(tmp_path / "out", tmp_path / "again", sync=False)
    assert digests(tmp_path / "again") == digests(source)
    assert set(files) == set(digests(source))
    index = source / "model.safetensors.index.json"
    if index.exists():
        again = json.loads((tmp_path / "again" / index.name).read_text())
        assert again["weight_map"] == json.loads(index.read_text())["weight_map"]
    assert (tmp_path / "again" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_shared_heads_experts_on_ranks_and_unused_tensors(tmp_path: Path) -> None:
    source = pico.save("llama", tmp_path / "heads", num_key_value_heads=2)
    reshard.convert(source, tmp_path / "heads4", tp_size=4)
    reshard.merge(tmp_path / "heads4", tmp_path / "heads-again")
    assert digests(tmp_path / "heads-again") == digests(source)

    source = pico.save("qwen3_moe", tmp_path / "experts")
    add(source, {"unknown.weight": torch.randn(3, 5), "unknown.scale": torch.tensor(2.0)})
    for tp, ep in ((2, 2), (4, 2), (2, 4)):
        out = tmp_path / f"experts{tp}{ep}"
        reshard.convert(source, out, tp_size=tp, ep_size=ep)
        assert (out / "unused.safetensors").exists()
        reshard.merge(out, tmp_path / f"again{tp}{ep}")
        assert digests(tmp_path / f"again{tp}{ep}") == digests(source)


def test_tied_weights_that_the_checkpoint_holds_twice(tmp_path: Path) -> None:
    source = pico.save("llama", tmp_path / "source", tie_word_embeddings=True)
    whole = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    add(source, {"lm_head.weight": whole["model.embed_tokens.weight"]})
    reshard.convert(source, tmp_path / "out", tp_size=2)
    reshard.merge(tmp_path / "out", tmp_path / "again")
    assert digests(tmp_path / "again") == digests(source)


def test_what_cannot_be_undone_is_said(tmp_path: Path) -> None:
    source = pico.save("llama", tmp_path / "source")
    reshard.convert(source, tmp_path / "cast", tp_size=2, dtype="bfloat16")
    with pytest.raises(BadInputError, match=r"\d+ tensors were cast to another dtype.*: model\.embed_tokens"):
        reshard.merge(tmp_path / "cast", tmp_path / "again")
    add(source, {"unknown": torch.zeros(2)})
    reshard.convert(source, tmp_path / "dropped", tp_size=2, drop_unused=True)
    with pytest.raises(BadInputError, match="1 tensors of the source were dropped: unknown"):
        reshard.merge(tmp_path / "dropped", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def open_with_transformers(folder: Path) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "phi3"])
def test_a_standard_checkpoint_of_what_was_cast_and_dropped(family: str, tmp_path: Path) -> None:
    """The checkpoint is transformers' copy of the source in that dtype, without the tensors that it does not use."""
    source = pico.save(family, tmp_path / "source")
    add(source, {"unknown.weight": torch.zeros(2)})
    reshard.convert(source, tmp_path / "out", tp_size=2, dtype="bfloat16", drop_unused=True)
    files = reshard.merge(tmp_path / "out", tmp_path / "again", layout="hf")
    assert sorted(files) == sorted(digests(source))
    held = [name for file in files for name in load_file(tmp_path / "again" / file)]
    assert "unknown.weight" not in held
    assert len(held) == len(set(held))
    configure(source, dtype="bfloat16")
    configure(tmp_path / "again", dtype="bfloat16")
    expected, found = open_with_transformers(source), open_with_transformers(tmp_path / "again")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_standard_checkpoint_of_what_is_whole(resharded_llama: Path, tmp_path: Path) -> None:
    files = reshard.merge(resharded_llama, tmp_path / "again", layout="hf")
    for file in files:
        expected, found = load_file(tmp_path / "source" / file), load_file(tmp_path / "again" / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(UsageError, match="layout gguf: not one of source, hf"):
        reshard.merge(resharded_llama, tmp_path / "third", layout="gguf")


def test_a_file_of_nothing_but_dropped_tensors_is_left_out(tmp_path: Path) -> None:
    source = pico.save("llama", tmp_path / "source")
    save_file({"unknown": torch.zeros(2)}, source / "model-unknown.safetensors", {"format": "pt"})
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["unknown"] = "model-unknown.safetensors"
    index.write_text(json.dumps(content))
    reshard.convert(source, tmp_path / "out", tp_size=2, drop_unused=True)
    assert "model-unknown.safetensors" not in reshard.merge(tmp_path / "out", tmp_path / "again", layout="hf")
    open_with_transformers(tmp_path / "again")


def test_one_file_of_another_name_has_an_index(tmp_path: Path) -> None:
    source = pico.save("llama", tmp_path / "source")
    tensors = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in source.glob("*.safetensors"):
        path.unlink()
    save_file(tensors, source / "only.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "only.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    reshard.convert(source, tmp_path / "out", tp_size=2)
    reshard.merge(tmp_path / "out", tmp_path / "again")
    assert digests(tmp_path / "again") == digests(source)
    open_with_transformers(tmp_path / "again")


def test_tied_weights_that_are_cut_differently(tmp_path: Path) -> None:
    """One tied weight is replicated and the other is cut; each element is still taken once."""
    source = pico.save("llama", tmp_path / "source", tie_word_embeddings=True)
    plan = {"extends": "auto", "model.embed_tokens": "replicate"}
    made = reshard.convert(source, tmp_path / "out", tp_size=2, tp_plan=plan)
    placements = {p.name: p.placement for p in made.parameters}
    assert placements["lm_head.weight"] != placements["model.embed_tokens.weight"]
    reshard.merge(tmp_path / "out", tmp_path / "again")
    assert digests(tmp_path / "again") == digests(source)


@pytest.fixture
def resharded_llama(tmp_path: Path) -> Path:
    reshard.convert(pico.save("llama", tmp_path / "source"), tmp_path / "out", tp_size=2)
    return tmp_path / "out"


def test_an_altered_rank_file_does_not_become_a_source(resharded_llama: Path, tmp_path: Path) -> None:
    path = resharded_llama / RANK_FILES[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"shard-00002.*: tensor \S+ was altered"):
        reshard.merge(resharded_llama, tmp_path / "again")
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_a_source_of_another_digest_is_not_given_out(resharded_llama: Path, tmp_path: Path) -> None:
    reseal(resharded_llama, lambda content: content["source"]["files"][0].update(digest="xxh3-128:00"))
    with pytest.raises(IntegrityError, match=r"model-00001\S+ does not come out as it went in"):
        reshard.merge(resharded_llama, tmp_path / "again")
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_a_shorter_rank_file_and_a_place_that_is_taken(resharded_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DestinationExistsError):
        reshard.merge(resharded_llama, tmp_path / "source")
    os.truncate(resharded_llama / RANK_FILES[1], 5000)
    with pytest.raises(IntegrityError, match="expected"):
        reshard.merge(resharded_llama, tmp_path / "again")


def rewrite(folder: Path, old: str, new: str) -> None:
    """Change a manifest's text and seal it again."""
    text = (folder / "reshard.json").read_text()
    assert old in text
    content = json.loads(text.replace(old, new))
    del content["seal"]
    (folder / "reshard.json").write_bytes(sealed_text(content))


@pytest.mark.parametrize(
    ("old", "new", "error", "words"),
    [
        ('"file": "model-00001-of-00003', '"file": "../model-00001-of-00003', PolicyError, "not a plain file name"),
        ('"file": "model-00001-of-00003.safetensors', '"file": "config.json', BadInputError, "not the name of a safe"),
        ('"duplicates": {', '"duplicates": {"gone": "lm_head.weight"', BadInputError, "no source file holds gone"),
        ('"file": "model-00001-of-00003', '"file": "model-00002-of-00003', BadInputError, "occurs twice"),
        ("model.norm.weight", "model.norm.weigth", IntegrityError, "that were written: model.norm.weight"),
    ],
)
def test_a_manifest_that_nobody_vouches_for(
    old: str, new: str, error: type[Exception], words: str, resharded_llama: Path, tmp_path: Path
) -> None:
    rewrite(resharded_llama, old, new)
    with pytest.raises(error, match=words):
        reshard.merge(resharded_llama, tmp_path / "again")
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_rank_files_of_other_shapes_are_not_read(resharded_llama: Path, tmp_path: Path) -> None:
    path = resharded_llama / RANK_FILES[0]
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"shape":[65,32]', b'"shape":[32,65]'))
    assert path.read_bytes() != data
    with pytest.raises(IntegrityError, match=r"of another shape: lm_head\.weight"):
        reshard.merge(resharded_llama, tmp_path / "again")


def test_the_command(resharded_llama: Path, tmp_path: Path, cli: Cli, refused: Refused) -> None:
    result = cli("merge", resharded_llama, tmp_path / "again")
    assert (result.code, result.err) == (0, "")
    assert "3 source files, as they were" in result.out
    assert digests(tmp_path / "again") == digests(tmp_path / "source")
    standard = cli("merge", resharded_llama, tmp_path / "standard", "--layout", "hf")
    assert (standard.code, standard.err) == (0, "")
    assert "3 files with new headers" in standard.out
    report = cli("merge", resharded_llama, tmp_path / "third", "--format", "json")
    assert json.loads(report.out)["files"] == sorted(digests(tmp_path / "source"))

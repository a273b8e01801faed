"""The places of a checkpoint's weights: indexes at odds with their files, subfolders, variants, links; and merge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli_tools import (
    FIRST,
    INDEX,
    RANK_FILES,
    Cli,
    Refused,
    configure,
    convert,
    file_of,
    first_file,
    link,
    reseal,
    rewrite,
    single_file,
    weight_map,
)
from layout_tools import HEAD, NORM, ODD, PLACES, SINGLE, _into_folder, _one_file, _twice, _variant, weights_in
from safetensors.torch import load_file, save_file

import reshard
from reshard.checkpoint.indexed import join
from reshard.checkpoint.weights import Weights
from reshard.errors import BadInputError, PolicyError, UsageError
from reshard.files.header import Header, TensorInfo


def assert_converts(source: Path, out: Path, resharded: Path | None, **where: Any) -> reshard.ReshardPlan:
    """Check that rank files match the original checkpoint and merge restores what was read. Returns the plan."""
    planned = reshard.plan(source, tp_size=2, **where)
    reshard.convert(source, out, tp_size=2, sync=False, **where)
    if resharded:
        for name in RANK_FILES:
            assert (out / name).read_bytes() == (resharded / name).read_bytes()
    reshard.verify(out, against=source, **where)
    reshard.merge(out, out.with_name("merged"), sync=False)
    there = weights_in(source)
    assert weights_in(out.with_name("merged")) == {file.name: there[file.name] for file in planned.source.files}
    return planned


def assert_loads(folder: Path, resharded: Path) -> None:
    """Check that transformers finds the weights of the folder by itself, and that they are the checkpoint's."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.state_dict()[NORM], load_file(resharded / RANK_FILES[0])[NORM])
    assert torch.equal(model.state_dict()[HEAD][:65], load_file(resharded / RANK_FILES[0])[HEAD])


# --- an index that is at odds with its files ---


@pytest.mark.parametrize("case", ODD)
def test_an_index_at_odds_with_its_files(case: str, source: Path, out: Path, resharded: Path) -> None:
    spoil, said = ODD[case]
    spoil(source)
    planned = assert_converts(source, out, resharded)
    assert any(said in note for note in planned.notes), planned.notes
    assert_loads(out.with_name("merged"), resharded)


def test_a_folder_of_copies_says_so(source: Path, out: Path) -> None:
    """The manifest warns readers that take a tensor in two files for a mistake."""
    _twice(source)
    reshard.convert(source, out, tp_size=1, sync=False)
    content = json.loads((out / "reshard.json").read_text())
    assert (content["format_version"], content["requires"]) == ("3.0", ["copies"])


def test_the_copy_that_the_index_names_is_taken(source: Path) -> None:
    _twice(source)
    for file in sorted(source.glob("model-*")):
        if NORM in load_file(file):
            weight_map(source, lambda found, name=file.name: found.update({NORM: name}))
            assert reshard.plan(source, tp_size=2).source.tensors[NORM].file == file.name


def test_a_tensor_twice_goes_on_to_other_ranks_and_into_a_standard_checkpoint(
    source: Path, out: Path, resharded: Path
) -> None:
    _twice(source)
    reshard.convert(source, out, tp_size=1, sync=False)
    assert_converts(source, out.with_name("again"), resharded)
    reshard.convert(out, out.with_name("wider"), tp_size=2, sync=False)
    for name in RANK_FILES:
        assert (out.with_name("wider") / name).read_bytes() == (resharded / name).read_bytes()
    reshard.merge(out, out.with_name("hf"), layout="hf", sync=False)
    held = [name for path in out.with_name("hf").glob("*.safetensors") for name in load_file(path)]
    assert len(held) == len(set(held))
    assert_loads(out.with_name("hf"), resharded)


def test_a_lacking_tensor_that_the_model_needs_is_missed(source: Path, out: Path, refused: Refused) -> None:
    rewrite(file_of(source, NORM), lambda tensors: tensors.pop(NORM))
    refused(3, convert(source, out), "lacks 1 ", NORM)


def test_one_file_beside_an_index_of_others_is_taken_as_transformers_does(source: Path, out: Path) -> None:
    other = single_file(
        Path(shutil.copytree(source, source.with_name("other"))), lambda t: t.update({NORM: t[NORM] + 1})
    )
    shutil.copy(other / SINGLE, source)
    planned = assert_converts(source, out, None)
    assert f"{SINGLE} is taken, as transformers does, and {INDEX} is not" in planned.notes
    expected = transformers.AutoModelForCausalLM.from_pretrained(source).state_dict()[NORM]
    assert torch.equal(load_file(out / RANK_FILES[0])[NORM], expected)
    assert [path.name for path in out.with_name("merged").glob("*.index.json")] == []


def test_one_file_that_the_index_names_too_is_one_of_its_files(source: Path, out: Path) -> None:
    first_file(source).rename(source / SINGLE)
    weight_map(source, lambda found: found.update({name: SINGLE for name in found if found[name] == FIRST}))
    assert len(assert_converts(source, out, None).source.files) == 3


def _headers(*tensors: tuple[str, int, int]) -> dict[str, Header]:
    """Return one header per (file, offset, bytes), each with a single tensor."""
    return {
        file: Header(b"", (TensorInfo("x", "U8", (size,), file, start, start + size),)) for file, start, size in tensors
    }


def test_copies_are_compared_whole_in_pieces_of_4_mib() -> None:
    size = (9 << 20) + 5
    content = {"a": b"-" + bytes(size), "b": bytes(size)}
    asked = []

    def read(name: str, start: int, end: int) -> bytes:
        asked.append(end - start)
        return content[name][start:end]

    headers = _headers(("a", 1, size), ("b", 0, size))
    tensors, notes = join(headers, Weights(("a", "b"), "index", {"x": "b"}), read)
    assert (tensors["x"].file, max(asked), sum(asked)) == ("b", 4 << 20, 2 * size)
    assert notes == ("in two files, with the same bytes: x (a, b)",)
    content["a"] = content["a"][:-1] + b"!"
    with pytest.raises(BadInputError, match="x \\(a, b\\)"):
        join(headers, Weights(("a", "b"), "index", {"x": "b"}), read)
    with pytest.raises(BadInputError):  # tensors of different shapes are not read
        join(_headers(("a", 1, size), ("b", 0, 4)), Weights(("a", "b")), lambda *_: pytest.fail("read"))
    with pytest.raises(BadInputError):  # a file that was cut short meanwhile does not count as equal bytes
        join(headers, Weights(("a", "b")), lambda *_: b"")


# --- weights elsewhere in the folder ---


@pytest.mark.parametrize("case", PLACES)
def test_weights_elsewhere_in_the_folder(case: str, source: Path, out: Path, resharded: Path) -> None:
    make, weights, index = PLACES[case]
    make(source)
    assert_converts(source, out, resharded, weights=weights)
    merged = out.with_name("merged")
    assert [path.relative_to(merged).as_posix() for path in merged.rglob("*.index.json")] == ([index] if index else [])
    assert_loads(merged, resharded)
    assert reshard.plan(merged, tp_size=2).source.files  # without any option


@pytest.mark.parametrize("case", ["one file in a subfolder", "one file of a variant", "one file of another name"])
def test_reference_logits_of_weights_elsewhere(case: str, source: Path, out: Path, tmp_path: Path) -> None:
    """The file that nobody names belongs to another model."""
    make, weights, _ = PLACES[case]
    make(source)
    reshard.convert(source, out, tp_size=1, weights=weights, sync=False, reference_logits=True)
    plain = tmp_path / "plain"
    reshard.merge(out, plain, sync=False)
    found = load_file(out / "reference.logits")
    with torch.inference_mode():
        logits = transformers.AutoModelForCausalLM.from_pretrained(plain)(found["ids"]).logits
    assert torch.equal(found["values"], logits[:, -found["values"].shape[1] :])


def test_an_option_goes_before_the_configuration(source: Path, out: Path, resharded: Path) -> None:
    configure(source, transformers_weights="gone.safetensors")
    assert_converts(source, out, resharded, weights=INDEX)
    for named in (5, "../model.safetensors", "model.bin"):
        configure(source, transformers_weights=named)
        with pytest.raises((BadInputError, PolicyError), match="transformers_weights"):
            reshard.plan(source, tp_size=2)


@pytest.mark.parametrize("weights", ["", "../source", "/etc", "a//b", "a/../b", ".."])
def test_weights_of_no_plain_path(weights: str, source: Path) -> None:
    with pytest.raises((UsageError, PolicyError), match="weights"):
        reshard.plan(source, tp_size=2, weights=weights)


def test_options_of_nothing(source: Path, resharded: Path, tmp_path: Path) -> None:
    for call in (
        lambda: reshard.verify(resharded, weights="fp16"),
        lambda: reshard.verify(resharded, links_into=[tmp_path]),
        lambda: reshard.plan(resharded, tp_size=2, weights="fp16"),
        lambda: reshard.plan(source, tp_size=2, links_into=[tmp_path / "gone"]),
    ):
        with pytest.raises(UsageError):
            call()


# --- what there is instead ---


def _adapter(source: Path) -> None:
    edit = {"base_model_name_or_path": "org/base"}
    (source / "adapter_config.json").write_text(json.dumps(edit))
    save_file({"base_model.model.lora_A.weight": torch.zeros(2, 2)}, source / "adapter_model.safetensors")


def _adapter_alone(source: Path) -> None:
    for path in [*source.glob("model*"), source / "config.json"]:
        path.unlink()
    _adapter(source)


INSTEAD: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a variant": (lambda s: _one_file(s, "model.fp16.safetensors"), "model.fp16.safetensors", "--weights fp16"),
    "a variant of several files": (_variant, "model.safetensors.index.fp16.json", "--weights fp16"),
    "a subfolder": (lambda s: _into_folder(s, index=True), f"parts/{INDEX}", "--weights parts"),
    "no index": (lambda s: (s / INDEX).unlink(), FIRST, f"fetch {INDEX} too"),
    "another name": (lambda s: _one_file(s, "special.safetensors"), "special", "--weights special.safetensors"),
    "an adapter alone": (_adapter_alone, "an adapter", "merge it into its base model org/base"),
    "GGUF": (lambda s: (single_file(s), (s / SINGLE).rename(s / "m.gguf")), "m.gguf", "made from"),
    "pickles": (lambda s: (single_file(s), (s / SINGLE).rename(s / "m.bin")), "pickled (m.bin)", "transformers"),
    "a file that the index names is missing": (lambda s: first_file(s).unlink(), f"{FIRST}: is missing", "fetch it"),
}  # fmt: skip


@pytest.mark.parametrize("case", INSTEAD)
def test_what_there_is_instead_is_said(case: str, source: Path, out: Path, refused: Refused) -> None:
    make, said, hint = INSTEAD[case]
    make(source)
    refused(3, convert(source, out), said, hint=hint)


def test_what_is_named_and_is_not_there(source: Path, out: Path, refused: Refused) -> None:
    refused(3, convert(source, out, "--weights", "bf16"), "no weights by the name of bf16")


def test_an_adapter_beside_the_model_is_told(source: Path, out: Path, resharded: Path) -> None:
    _adapter(source)
    (source / "adapter_model.safetensors").unlink()  # merge does not restore it, as it is no weights of the model
    planned = assert_converts(source, out, resharded)
    assert any("adapter" in note and "base" in note for note in planned.notes), planned.notes
    assert not [path for path in out.iterdir() if path.name.startswith("adapter")]


def test_a_file_in_place_of_a_folder(source: Path, out: Path, refused: Refused) -> None:
    refused(3, convert(first_file(source), out), f"{FIRST}: is a file", hint=f"give its folder: {source}")
    refused(3, convert(source / "config.json", out), "config.json: is a file", hint=f"give its folder: {source}")


# --- links ---


def _linked(source: Path, *stores: Path) -> None:
    """Replace each weight file with a link into one of the stores, in turn."""
    for number, path in enumerate(sorted(source.glob("model-*"))):
        store = stores[number % len(stores)]
        store.mkdir(exist_ok=True)
        link(path, store / f"blob{number}")


def test_links_into_a_store(source: Path, out: Path, tmp_path: Path, resharded: Path, cli: Cli) -> None:
    stores = [tmp_path / "store one", tmp_path / "store two"]
    _linked(source, *stores)
    (tmp_path / "name for it").symlink_to(stores[0])
    result = cli(*convert(source, out, "--links-into", tmp_path / "name for it", "--links-into", stores[1]))
    assert result.code == 0, result
    for name in RANK_FILES:
        assert (out / name).read_bytes() == (resharded / name).read_bytes()
    verify = ["verify", out, "--against", source]
    assert cli(*verify).code == 11
    assert cli(*verify, "--links-into", stores[0], "--links-into", stores[1]).code == 0


def test_other_links_are_refused_as_before(source: Path, out: Path, tmp_path: Path, refused: Refused) -> None:
    _linked(source, tmp_path / "one", tmp_path / "two")
    refused(11, convert(source, out), "leads out", hint=f"--links-into {tmp_path / 'one'}")
    refused(11, convert(source, out, "--links-into", tmp_path / "one"), hint=f"--links-into {tmp_path / 'two'}")
    both = ("--links-into", tmp_path / "one", "--links-into", tmp_path / "two")
    link(source / "config.json", tmp_path / "one" / "config")  # this is not a weight file
    refused(11, convert(source, out, *both), "config.json")


# --- a manifest that nobody vouches for ---


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "a/../../x.safetensors", "/x.safetensors", "a//x.safetensors", "./x.safetensors",
     "a/./x.safetensors", "a\\x.safetensors", "a/\0.safetensors",
     "config.json/x.safetensors", "model-00002-of-00003.safetensors/x.safetensors", "reshard.json/x.safetensors"],
)  # fmt: skip
def test_paths_of_a_manifest_stay_inside(name: str, folder: Path, tmp_path: Path, refused: Refused) -> None:
    def change(content: dict[str, Any]) -> None:
        content["source"]["files"][0]["file"] = name

    reseal(folder, change)
    for command in (["merge", folder, tmp_path / "x" / "merged"], convert(folder, tmp_path / "again")):
        code = 3 if name.split("/")[0] in ("config.json", "reshard.json", "model-00002-of-00003.safetensors") else 11
        refused(code, command)


def test_a_tensor_in_two_files_of_a_manifest_is_the_same_in_both(
    folder: Path, tmp_path: Path, refused: Refused
) -> None:
    def change(content: dict[str, Any]) -> None:
        header = {"lm_head.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
        text = json.dumps(header)
        file = {"file": "x.safetensors", "size": 8 + len(text) + 4, "digest": "xxh3-128:0", "header": text}
        content["source"]["files"].append(file)

    reseal(folder, change)
    refused(3, ["merge", folder, tmp_path / "merged"], "lm_head.weight is in two source files")


def test_a_configuration_names_no_index_outside(source: Path, out: Path, tmp_path: Path, cli: Cli) -> None:
    configure(source, transformers_weights="../evil.safetensors.index.json")
    assert cli(*convert(source, out, "--weights", INDEX)).code == 0
    assert cli("merge", out, tmp_path / "in" / "merged").code == 0
    assert [path.name for path in tmp_path.rglob("*.index.json") if source not in path.parents] == [INDEX]


def test_a_rank_file_is_in_no_folder(folder: Path, refused: Refused) -> None:
    (folder / "sub").mkdir()
    (folder / RANK_FILES[0]).rename(folder / "sub" / RANK_FILES[0])
    reseal(folder, lambda content: content["ranks"][0].update(file=f"sub/{RANK_FILES[0]}"))
    refused(11, ["merge", folder, folder.with_name("merged")], "sub/")

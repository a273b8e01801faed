"""A conversion in parts: the bytes of one run, whatever the source and the order; parts that do not go together."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from cli_tools import Checkpoint, Cli, Refused, assert_one_error, tree
from kill_tools import interrupted_after
from merge_tools import add
from quantizing import quantize_folder

import reshard
from reshard.errors import (
    BadInputError,
    DestinationExistsError,
    IntegrityError,
    StorageError,
    UsageError,
    VersionError,
)
from reshard.execution.parts.record import DRAFT_NAME, RECORD_NAME
from reshard.operations.convert import work
from reshard.resharded.manifest import sealed_text

PART_2 = "part-00002-of-00003"


def made(source: Path | str, out: Path, parts: int, *, seed: int = 0, **options: Any) -> None:
    """Make all parts, in any order, and finish."""
    numbers = list(range(1, parts + 1))
    random.Random(seed).shuffle(numbers)
    for number in numbers:
        reshard.convert_part(source, out, part=f"{number}/{parts}", **options)
    reshard.finish(out)


def assert_as_one(source: Path | str, room: Path, parts: int, **options: Any) -> None:
    reshard.convert(source, room / "one", **options)
    made(source, room / "out", parts, seed=parts, **options)
    assert tree(room / "out") == tree(room / "one")
    assert not list(room.glob("out.*"))


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "gpt_oss"])
def test_the_bytes_are_those_of_one_run(family: str, parts: int, checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert_as_one(checkpoint(family), tmp_path, parts, tp_size=4)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"tp_plan": "general"},
        {"ep_size": 3},
        {"quantize": "int8"},
        {"quantize": "nf4", "quantize_config": {"bnb_4bit_use_double_quant": True}},
    ],
    ids=str,
)
def test_so_are_they_with_options(options: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path) -> None:
    family = "mixtral" if "ep_size" in options else "llama"
    assert_as_one(checkpoint(family), tmp_path, 2, tp_size=3, **options)


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_quantized_checkpoint(dequantize: bool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = quantize_folder(checkpoint("llama"), tmp_path / "source", "fp8")
    assert_as_one(source, tmp_path, 2, tp_size=2, dequantize=dequantize)


def test_unused_tensors_small_files_and_folders(source: Path, tmp_path: Path) -> None:
    add(source, {"unknown.weight": torch.randn(3, 5), "unknown.scale": torch.tensor(2.0)})
    (source / "assets").mkdir()
    (source / "assets" / "note.txt").write_text("mine")
    assert_as_one(source, tmp_path, 3, tp_size=3, include=["assets/*"])
    (tmp_path / "dropped").mkdir()
    assert_as_one(source, tmp_path / "dropped", 3, tp_size=3, drop_unused=True)


@pytest.mark.parametrize("quantized", [False, True])
def test_from_a_resharded_folder(quantized: bool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """N→M of what was made in parts, in parts."""
    options = {"quantize": "nf4"} if quantized else {}
    made(checkpoint("llama"), tmp_path / "two", 2, tp_size=2, **options)
    assert_as_one(tmp_path / "two", tmp_path, 4, tp_size=4)
    reshard.verify(tmp_path / "out", against=checkpoint("llama"))


@pytest.mark.fault(19)
def test_verifying_in_parts(source: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts check all that one run does, and no rank file twice."""
    add(source, {"unknown.weight": torch.randn(3, 5)})
    out = tmp_path / "out"
    reshard.convert(source, out, tp_size=4)
    whole = reshard.verify(out, against=source)
    parts = [reshard.verify(out, against=source, part=f"{number}/3") for number in (1, 2, 3)]
    for name in ("files", "tensors", "size", "elements"):
        assert sum(getattr(part, name) for part in parts) == getattr(whole, name)
    for rank, expected in enumerate([1, 2, 3, 3]):
        path = out / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        codes = [cli("verify", out, "--part", f"{number}/3").code for number in (1, 2, 3)]
        assert codes == [4 if number == expected else 0 for number in (1, 2, 3)]
        path.write_bytes(data)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert json.loads(cli("verify", out, "--part", "auto", "--format", "json").out)["files"] == 2
    assert_one_error(cli("verify", out, "--part", "1/5"), 2, "5 parts of 4 rank files", hint="4 parts or fewer")


def test_the_report(checkpoint: Checkpoint, tmp_path: Path, cli: Cli) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    command = ["convert", source, out, "-tp", 4, "--format", "json", "--part"]
    planned = json.loads(cli(*command, "2/3", "--dry-run").out)["part"]
    assert not list(tmp_path.iterdir())
    done = json.loads(cli(*command, "2/3").out)
    assert {key: done[key] for key in planned} == planned
    assert planned["bytes_written"] == sum(path.stat().st_size for path in out.parent.rglob("shard-*"))
    assert 0 < planned["bytes_read"] <= sum(path.stat().st_size for path in source.glob("*.safetensors"))
    again = json.loads(cli(*command, "2/3").out)
    assert (again["done_before"], again["bytes_written"], again["bytes_read"]) == (True, 0, 0)
    assert cli(*command[:5], "--part", "1/3").out.startswith(f"{out}: part 1 of 3: 1 file, ")
    finish = cli(*command[:5], "--part", "3/3", aloud=True).err
    assert f"next, when all parts are done: reshard finish {out}" in finish
    result = cli("finish", out, aloud=True)
    assert result.code == 0
    assert "finishing" in result.err
    assert result.out.startswith(f"{out}: 4 rank files, ")


def test_finishing_twice(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    made(source, out, 2, tp_size=2)
    before = tree(out)
    assert reshard.finish(out) == reshard.inspect(out)
    report = reshard.convert_part(source, out, part="1/2", tp_size=2)
    assert report.done
    assert tree(tmp_path) == {"out": tree(tmp_path)["out"], **{f"out/{name}": data for name, data in before.items()}}


def test_a_part_that_was_interrupted_goes_on(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    reshard.convert(source, tmp_path / "one", tp_size=2)
    with interrupted_after(5):
        reshard.convert_part(source, out, part="2/2", tp_size=2, workers=1)
    with pytest.raises(BadInputError, match="no part of it is done"):
        reshard.finish(out)
    sizes: list[int] = []
    real = work.write_files
    monkeypatch.setattr(
        work, "write_files", lambda *a, **k: (sizes.append(len(k["journal"].claimed)), real(*a, **k))[1]
    )
    made(source, out, 2, tp_size=2)
    assert sorted(sizes) == [0, 5]
    assert tree(out) == tree(tmp_path / "one")


@pytest.fixture
def parts(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A destination of three parts of which the second is not done."""
    for part in ("1/3", "3/3"):
        reshard.convert_part(checkpoint("llama"), tmp_path / "out", part=part, tp_size=4)
    return tmp_path / "out"


def test_what_is_not_done_is_named(parts: Path, checkpoint: Checkpoint, refused: Refused, cli: Cli) -> None:
    refused(4, ["finish", parts], "out.parts: part 2 of 3 is not done", hint="--part 2/3")
    shutil.rmtree(parts.with_name("out.parts") / "part-00003-of-00003")
    refused(4, ["finish", parts], "out.parts: parts 2, 3 of 3 are not done")
    refused(3, ["finish", parts.with_name("none")], "no part of it is done", hint="--part 1/8")
    command = ["convert", checkpoint("llama"), parts, "--part"]
    refused(2, [*command, "2/9", "-tp", 8], "9 parts of 8 rank files", hint="8 parts or fewer")
    refused(2, [*command, "5/4", "-tp", 8], "'5/4' is no part", hint="3/8")
    refused(2, [*command, "2/3", "-tp", 4, "--overwrite"], "--overwrite does not go with --part")
    refused(2, [*command, "2/3", "-tp", 4, "--reference-logits"], "--reference-logits does not", hint="reshard check")
    refused(
        4, [*command, "2/4", "-tp", 4], "part 2 of 4 does not go with part 1 of 3", hint="out.parts/part-00001-of-00003"
    )


def other_plan(patch: pytest.MonkeyPatch, source: Path) -> dict[str, Any]:
    return {"tp_size": 3}


def other_version(patch: pytest.MonkeyPatch, source: Path) -> dict[str, Any]:
    patch.setattr(work, "__version__", "9.9")
    return {"tp_size": 4}


def other_time(patch: pytest.MonkeyPatch, source: Path) -> dict[str, Any]:
    os.utime(next(source.glob("*.safetensors")), ns=(1, 1))
    return {"tp_size": 4}


def other_files(patch: pytest.MonkeyPatch, source: Path) -> dict[str, Any]:
    pico.save("llama", source, vocab_size=128)
    return {"tp_size": 4}


def other_config(patch: pytest.MonkeyPatch, source: Path) -> dict[str, Any]:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 77}))
    return {"tp_size": 4}


OTHERS = {
    "another plan": (IntegrityError, other_plan),
    "another state of the source files": (IntegrityError, other_time),
    "another list of source files": (IntegrityError, other_files),
    "another set of small files": (IntegrityError, other_config),
    "is made by reshard 9.9": (VersionError, other_version),
}


@pytest.mark.fault(33)
@pytest.mark.parametrize("words", OTHERS)
def test_parts_of_another_source_plan_or_version(
    words: str, parts: Path, source: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part is refused before it writes; if it could not see the others, the folder is not finished."""
    shutil.copystat(checkpoint("llama"), source)
    for path in checkpoint("llama").iterdir():
        shutil.copystat(path, source / path.name)
    error, change = OTHERS[words]
    with monkeypatch.context() as patch:
        options = change(patch, source)
        with pytest.raises(error, match=f"part 2 of 3 .*{words}"):
            reshard.convert_part(source, parts, part="2/3", **options)
        reshard.convert_part(source, parts.with_name("alone"), part="2/3", **options)
    shutil.move(parts.with_name("alone.parts") / PART_2, parts.with_name("out.parts"))
    before = tree(parts.parent)
    with pytest.raises(error, match=f"part 2 of 3 .*{words}"):
        reshard.finish(parts)
    assert tree(parts.parent) == before
    shutil.rmtree(parts.with_name("out.parts") / PART_2)
    reshard.convert_part(checkpoint("llama"), parts, part="2/3", tp_size=4)
    reshard.finish(parts)
    assert reshard.verify(parts, against=checkpoint("llama")).elements


@pytest.mark.fault(33, 19)
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "small file"])
@pytest.mark.parametrize("moved", [False, True])
def test_a_file_that_was_damaged(
    damage: str, moved: bool, parts: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named with its part, which is made again once the file is removed. So too after a finish that was killed
    when the files were together already."""
    source = checkpoint("llama")
    reshard.convert_part(source, parts, part="2/3", tp_size=4)
    if moved:
        with monkeypatch.context() as patch:
            patch.setattr("reshard.operations.convert.finish._read_again", _interrupted)
            with pytest.raises(KeyboardInterrupt):
                reshard.finish(parts)
    name = "config.json" if damage == "small file" else "shard-00002-model-00001-of-00001.safetensors"
    number = 1 if damage == "small file" else 2
    [path] = parts.with_name("out.parts").rglob(name)
    assert (path.parent.name == "files") == moved
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=name) as refused:
        reshard.finish(parts)
    assert f"part {number} again" in str(refused.value.hint)
    assert not parts.exists()
    if damage in ("flipped", "small file"):
        assert "remove that file" in str(refused.value.hint)
        next(parts.with_name("out.parts").rglob(name)).unlink()
    reshard.convert_part(source, parts, part=f"{number}/3", tp_size=4)
    reshard.finish(parts)
    reshard.convert(source, parts.with_name("one"), tp_size=4)
    assert tree(parts) == tree(parts.with_name("one"))


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.fault(33, 12)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("part", [1, 3]),
        ("part", [9, 3]),
        ("format", "other"),
        ("files", [{"file": "../../evil", "size": 1, "digest": ""}]),
        ("extras", [{"file": "/etc/passwd", "size": 1, "digest": ""}]),
        ("files", []),
        ("files", 7),
        ("source", {}),
        ("work", None),
    ],
)
def test_a_record_that_is_not_ours(key: str, value: Any, parts: Path, checkpoint: Checkpoint) -> None:
    reshard.convert_part(checkpoint("llama"), parts, part="2/3", tp_size=4)
    path = parts.with_name("out.parts") / PART_2 / RECORD_NAME
    content = json.loads(path.read_text())
    content.pop("seal")
    path.write_bytes(sealed_text({**content, key: value}))
    before = tree(parts.parent)
    with pytest.raises(reshard.ReshardError) as refused:
        reshard.finish(parts)
    assert refused.value.exit_code in (4, 11)
    assert tree(parts.parent) == before


@pytest.mark.parametrize("name", [RECORD_NAME, DRAFT_NAME])
def test_a_record_or_draft_that_was_altered(name: str, parts: Path, checkpoint: Checkpoint) -> None:
    path = parts.with_name("out.parts") / "part-00001-of-00003" / name
    data = path.read_bytes()
    path.write_bytes(data.replace(b"model-", b"nodel-"))
    with pytest.raises(IntegrityError):
        reshard.finish(parts)


def test_a_draft_of_another_conversion(parts: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """It has a seal of its own, but the part's record names another."""
    reshard.convert_part(checkpoint("llama"), parts, part="2/3", tp_size=4)
    reshard.convert_part(checkpoint("llama"), tmp_path / "other", part="1/3", tp_size=3)
    draft = tmp_path / "other.parts" / "part-00001-of-00003" / DRAFT_NAME
    shutil.copy(draft, parts.with_name("out.parts") / "part-00001-of-00003" / DRAFT_NAME)
    with pytest.raises(IntegrityError, match="is not the draft of part 1 of 3"):
        reshard.finish(parts)
    assert not parts.exists()


def test_a_record_of_a_newer_release(parts: Path) -> None:
    path = parts.with_name("out.parts") / "part-00001-of-00003" / RECORD_NAME
    path.write_bytes(sealed_text({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(VersionError, match="record of version 2"):
        reshard.finish(parts)


def test_what_is_in_the_way(parts: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("llama")
    reshard.convert_part(source, parts, part="2/3", tp_size=4)
    parts.mkdir()
    with pytest.raises(DestinationExistsError, match="is no resharded folder"):
        reshard.finish(parts)
    with pytest.raises(DestinationExistsError, match="is no resharded folder"):
        reshard.convert_part(source, parts, part="2/3", tp_size=4)
    parts.rmdir()
    reshard.convert(source, parts, tp_size=2)
    before = tree(tmp_path)
    with pytest.raises(DestinationExistsError, match="is not what the parts make"):
        reshard.finish(parts)
    with pytest.raises(DestinationExistsError, match="already exists"):
        reshard.convert_part(source, parts, part="2/3", tp_size=4)
    with pytest.raises(UsageError, match="inside a resharded folder"):
        reshard.convert_part(source, parts / "in", part="1/2", tp_size=4)
    assert tree(tmp_path) == before


@pytest.mark.fault(33)
@pytest.mark.parametrize("other", ["weights", "small file"])
def test_a_part_that_comes_too_late(other: str, source: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The folder is whole. A part of the same bytes is done; one of other bytes of the same shapes is refused."""
    out = tmp_path / "out"
    made(checkpoint("llama"), out, 2, tp_size=2)
    before = tree(tmp_path)
    if other == "weights":
        path = sorted(source.glob("*.safetensors"))[-1]
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        (source / "generation_config.json").write_text("{}")
    with pytest.raises(DestinationExistsError, match="already exists"):
        reshard.convert_part(source, out, part="1/2", tp_size=2)
    same = shutil.copytree(checkpoint("llama"), tmp_path / "same")
    assert reshard.convert_part(same, out, part="1/2", tp_size=2).manifest == reshard.inspect(out)
    shutil.rmtree(same)
    shutil.rmtree(source)
    assert tree(tmp_path) == {name: data for name, data in before.items() if not name.startswith("source")}


@pytest.mark.fault(33)
@pytest.mark.parametrize("damage", ["other weights", "cut", "flipped"])
def test_parts_beside_a_folder_that_is_there(damage: str, source: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """They are removed only if every byte of them is in it."""
    out = tmp_path / "out"
    for part in ("1/2", "2/2"):
        reshard.convert_part(checkpoint("llama"), out, part=part, tp_size=2)
    if damage == "other weights":
        path = sorted(source.glob("*.safetensors"))[-1]
        path.write_bytes(path.read_bytes()[:-1] + b"1")
        reshard.convert(source, out, tp_size=2)
    else:
        reshard.convert(checkpoint("llama"), out, tp_size=2)
        path = next(out.glob("shard-*"))
        data = path.read_bytes()
        path.write_bytes(data[:-9] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    before = tree(tmp_path)
    with pytest.raises((DestinationExistsError, IntegrityError)):
        reshard.finish(out)
    assert tree(tmp_path) == before
    shutil.rmtree(out)
    reshard.finish(out)
    assert reshard.verify(out, against=checkpoint("llama")).elements


def test_names_that_cannot_be(checkpoint: Checkpoint, tmp_path: Path, refused: Refused) -> None:
    command = ["convert", checkpoint("llama")]
    refused(7, [*command, "/", "-tp", 2, "--part", "1/2"], "/: already exists")
    refused(7, ["finish", "/"], "/: already exists")
    for length in (230, 250):
        refused(5, [*command, tmp_path / ("n" * length), "-tp", 2, "--part", "1/2"], "File name too long")
    (tmp_path / "a.parts").write_text("mine")
    (tmp_path / "b.parts").symlink_to(tmp_path)
    for name in ("a", "b"):
        refused(7, ["finish", tmp_path / name], f"{name}.parts: is in the way")
        refused(7, [*command, tmp_path / name, "-tp", 2, "--part", "1/2"], f"{name}.parts: is in the way")


def test_what_is_of_no_part_is_not_taken_along(parts: Path, checkpoint: Checkpoint) -> None:
    reshard.convert_part(checkpoint("llama"), parts, part="2/3", tp_size=4)
    mine = parts.with_name("out.parts") / "files"
    mine.mkdir()
    (mine / "mine").write_text("mine")
    with pytest.raises(IntegrityError, match="holds what is of no part: mine"):
        reshard.finish(parts)
    (mine / "mine").unlink()
    reshard.finish(parts)


def test_a_folder_of_somebody_s_stays(parts: Path, checkpoint: Checkpoint) -> None:
    """`OUT.parts` may be a name that somebody has given to something else."""
    mine = parts.with_name("out.parts") / "mine.txt"
    mine.write_text("mine")
    reshard.convert_part(checkpoint("llama"), parts, part="2/3", tp_size=4)
    reshard.finish(parts)
    reshard.finish(parts)
    reshard.convert_part(checkpoint("llama"), parts, part="2/3", tp_size=4)
    assert mine.read_text() == "mine"
    other = parts.with_name("other")
    reshard.convert(checkpoint("llama"), other, tp_size=2)
    other.with_name("other.parts").mkdir()
    (other.with_name("other.parts") / "mine.txt").write_text("mine")
    reshard.finish(other)
    assert (other.with_name("other.parts") / "mine.txt").read_text() == "mine"


def test_a_disk_that_is_too_small(parts: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part asks for its own bytes only."""
    asked: list[int] = []
    monkeypatch.setattr(work, "check_free_space", lambda _, needed, *others: asked.append(needed))
    reshard.convert_part(checkpoint("llama"), parts, part="2/3", tp_size=4)
    reshard.convert(checkpoint("llama"), parts.with_name("one"), tp_size=4)
    assert asked[0] < asked[1]
    monkeypatch.setattr(work, "check_free_space", _full)
    with pytest.raises(StorageError, match="No space"):
        reshard.convert_part(checkpoint("llama"), parts.with_name("other"), part="2/3", tp_size=4)
    assert not parts.with_name("other.parts").exists()


def _full(*_: object) -> None:
    raise StorageError("No space")


def test_the_last_part_finishes(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        assert not out.exists()
        monkeypatch.setenv("RANK", str(rank))
        result = cli("convert", source, out, "-tp", 4, "--part", "auto", aloud=True)
        assert result.code == 0
    assert f"finished: {out} is whole" in result.err
    reshard.convert(source, tmp_path / "one", tp_size=4)
    assert tree(out) == tree(tmp_path / "one")
    assert not list(tmp_path.glob("out.*"))
    monkeypatch.delenv("RANK")
    assert_one_error(cli("convert", source, out, "-tp", 4, "--part", "auto"), 2, "has started this process", hint="3/8")

"""`convert --like`: new weights of the same model give the bytes of a conversion of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import Checkpoint, Cli, Refused, flip, rewrite, tree
from kill_tools import interrupted_after

import reshard
from reshard.errors import BadInputError, IntegrityError
from reshard.execution import earlier
from reshard.execution.earlier import Earlier, Taken
from reshard.files.header import read_header

ALL = ("model", "lm_head")


def changed(source: Path, beginning: str | tuple[str, ...]) -> Path:
    """Change the last element of the tensors whose names begin so; every element if all do."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.startswith(beginning):
                tensor.view(-1)[0 if beginning == ALL else -1 :] += 1

    for path in source.glob("*.safetensors"):
        rewrite(path, change)
    return source


def shared(text: str) -> int:
    [line] = [line for line in text.splitlines() if "bytes are shared with" in line]
    return int(line.split()[0].replace(",", ""))


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file system can share blocks: here they are copied."""

    def copy(source: int, start: int, target: int, offset: int, size: int) -> bool:
        assert start % 4096 == offset % 4096 == size % 4096 == 0
        return os.pwrite(target, os.pread(source, size, start), offset) == size

    monkeypatch.setattr(earlier, "_shared", copy)


WAYS: dict[str, dict[str, Any]] = {
    "plain": {"tp_size": 3},
    "one rank": {"tp_size": 1},
    "cast": {"tp_size": 2, "dtype": "bfloat16"},
    "general": {"tp_size": 2, "tp_plan": "general"},
    "rules": {"tp_size": 2, "tp_plan": {"lm_head": "colwise_gather_output"}},
    "experts": {"tp_size": 2, "ep_size": 2},
    "nf4": {"tp_size": 2, "quantize": "nf4", "quantize_config": {"bnb_4bit_use_double_quant": True}},
    "int8": {"tp_size": 3, "quantize": "int8"},
}


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("what", ["nothing", "model.layers.1", "model", ALL], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_the_bytes_are_those_of_a_fresh_conversion(
    way: str, what: str | tuple[str, ...], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    options = WAYS[way]
    before = checkpoint("mixtral" if way == "experts" else "llama")
    reshard.convert(before, tmp_path / "before", **options)
    kept = tree(tmp_path / "before")
    source = changed(Path(shutil.copytree(before, tmp_path / "source")), what)
    said: list[str] = []
    reshard.convert(source, tmp_path / "after", like=tmp_path / "before", say=said.append)
    reshard.convert(source, tmp_path / "fresh", **options)
    assert tree(tmp_path / "after") == tree(tmp_path / "fresh")
    assert tree(tmp_path / "before") == kept
    tensors = [name for record in reshard.inspect(tmp_path / "after").rank_files for name in record.tensors]
    taken = shared("\n".join(said))
    if what == ALL:
        assert taken < sum(path.stat().st_size for path in (tmp_path / "after").glob("shard-*")) / 3, tensors
    else:
        assert taken > 0


@pytest.mark.usefixtures("anywhere")
def test_a_tensor_is_taken_if_its_bytes_are_the_same(checkpoint: Checkpoint, tmp_path: Path, cli: Cli) -> None:
    """Those of one layer are not. Of the others, each that has a whole block is."""
    before, after = tmp_path / "before", tmp_path / "after"
    made = reshard.convert(checkpoint("llama"), before, tp_size=2)
    source = changed(Path(shutil.copytree(checkpoint("llama"), tmp_path / "source")), "model.layers.1.")
    result = cli("convert", source, after, "--like", before, aloud=True)
    assert result.code == 0, result.err
    same = 0
    for record, other in zip(made.rank_files, reshard.inspect(after).rank_files):
        digests = [name for name, digest in record.tensors.items() if other.tensors[name] == digest]
        assert 0 < len(digests) < len(record.tensors)
        header = read_header(before / record.name, file=record.name)
        same += sum(info.nbytes for info in header.tensors if info.name in digests and info.nbytes > 4096)
    assert shared(result.err) == same


@pytest.mark.fault(19)
@pytest.mark.usefixtures("anywhere")
def test_an_earlier_folder_that_was_altered(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """What is taken over is digested where it comes to: bytes that are not as they were are taken from the source."""
    reshard.convert(checkpoint("llama"), tmp_path / "before", tp_size=2)
    for path in (tmp_path / "before").glob("shard-*"):
        flip(path, path.stat().st_size - 1)
    reshard.convert(checkpoint("llama"), tmp_path / "after", like=tmp_path / "before")
    reshard.convert(checkpoint("llama"), tmp_path / "fresh", tp_size=2)
    assert tree(tmp_path / "after") == tree(tmp_path / "fresh")
    next((tmp_path / "before").glob("shard-*")).unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        reshard.convert(checkpoint("llama"), tmp_path / "other", like=tmp_path / "before")
    assert not (tmp_path / "other").exists()


@pytest.mark.fault(1)
def test_interrupted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    reshard.convert(checkpoint("llama"), tmp_path / "before", tp_size=2)
    with interrupted_after(7):
        reshard.convert(checkpoint("llama"), tmp_path / "after", like=tmp_path / "before", workers=1)
    reshard.convert(checkpoint("llama"), tmp_path / "after", like=tmp_path / "before")
    assert tree(tmp_path / "after") == tree(tmp_path / "before")


def test_refusals(checkpoint: Checkpoint, tmp_path: Path, refused: Refused) -> None:
    source, like = checkpoint("llama"), tmp_path / "before"
    reshard.convert(source, like, tp_size=2)
    command = ["convert", source, tmp_path / "out"]
    refused(2, command, "--tp-size is missing", hint="--like DIR")
    for options in (["-tp", 2], ["--ep-size", 2], ["--dtype", "bf16"], ["--quantize", "nf4"], ["--drop-unused"]):
        refused(2, [*command, "--like", like, *options], "--like takes the number of ranks", hint="leave out")
    refused(2, [*command, "--like", like, "--part", "1/2"], "--like does not go with --part")
    refused(2, [*command, "--like", like, "--dry-run"], "--like does not go with --dry-run", hint="reshard inspect")
    refused(2, [*command, "--like", "s3://bucket/out"], "is not on this machine")
    refused(3, [*command, "--like", source], "is not a resharded folder")
    refused(3, ["convert", checkpoint("mixtral"), tmp_path / "out", "--like", like], "is of another model")
    other = checkpoint("llama", dtype=torch.bfloat16)
    with pytest.raises(BadInputError, match="of another model, or was cast to another dtype"):
        reshard.convert(other, tmp_path / "out", like=like)


# --- the copy ---


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system whose files can share blocks."""
    if os.geteuid() or not shutil.which("mkfs.xfs"):
        pytest.skip("needs root and mkfs.xfs")
    room = tmp_path_factory.mktemp("xfs")
    image, folder = room / "image", room / "mounted"
    image.touch()
    os.truncate(image, 400 << 20)
    folder.mkdir()
    made = subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], capture_output=True, text=True)
    mounted = subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True, text=True)
    if made.returncode or mounted.returncode:
        pytest.skip(f"no loop device: {made.stderr or mounted.stderr}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_blocks_are_shared(sharing: Path, checkpoint: Checkpoint) -> None:
    """Where the file system can, what is taken over takes no room."""
    source = checkpoint("llama", vocab_size=60_000, hidden_size=256)
    reshard.convert(source, sharing / "before", tp_size=2)
    os.sync()
    free = shutil.disk_usage(sharing).free
    reshard.convert(source, sharing / "after", like=sharing / "before")
    os.sync()
    size = sum(path.stat().st_size for path in (sharing / "after").glob("shard-*"))
    assert size > 100_000_000
    assert free - shutil.disk_usage(sharing).free < size / 20
    assert reshard.verify(sharing / "after", against=source).elements


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(("start", "offset", "size"), [(4096, 8192, 10_000), (100, 4196, 9_000), (100, 4196, 4_200)])
def test_every_byte_is_taken(start: int, offset: int, size: int, tmp_path: Path) -> None:
    data = os.urandom(20_000)
    (tmp_path / "from").write_bytes(data)
    with open(tmp_path / "to", "w+b", buffering=0) as file:
        file.truncate(30_000)
        assert Taken(tmp_path / "from", start, size, "").share(file.fileno(), offset)
        assert file.read() == bytes(offset) + data[start : start + size] + bytes(30_000 - offset - size)


def test_a_file_system_that_cannot(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once, then everything is written."""
    asked = []
    monkeypatch.setattr(earlier, "_shared", lambda *_: bool(asked.append(1)))
    reshard.convert(checkpoint("llama"), tmp_path / "before", tp_size=2)
    said: list[str] = []
    reshard.convert(checkpoint("llama"), tmp_path / "after", like=tmp_path / "before", workers=1, say=said.append)
    assert tree(tmp_path / "after") == tree(tmp_path / "before")
    assert asked == [1]
    assert shared("\n".join(said)) == 0


def test_what_an_earlier_folder_has() -> None:
    there, small = Taken(Path("none"), 0, 8192, ""), Taken(Path("none"), 0, 4096, "")
    folder = Earlier({("file", "tensor"): there, ("file", "small"): small})
    assert folder.find("file", "tensor", 8192) == there
    assert folder.find("file", "tensor", 8193) is None
    assert folder.find("other", "tensor", 8192) is None
    assert folder.find("file", "small", 4096) is None  # it has no block of its own
    assert not there.begins_as(memoryview(b"a"))

"""A conversion that is killed, interrupted or refused by the disk: nothing at its destination, and the next goes on."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
import warm_commands
from cli_tools import RANK_FILES, Cli, convert, tree
from kill_tools import KILLED, convert_until, interrupt_after, interrupted_after, server

import reshard
from reshard.errors import DestinationExistsError, IntegrityError, StorageError
from reshard.execution import executor
from reshard.execution.journal import JOURNAL_NAME, Journal
from reshard.files.header import TensorInfo, read_header

STEP = 7  # step of the sweep in CI; the slow one takes every call


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.save("llama", tmp_path_factory.mktemp("resume") / "source")


@pytest.fixture(scope="module")
def whole(origin: Path) -> dict[str, object]:
    """The folder that an uninterrupted conversion makes."""
    reshard.convert(origin, origin.with_name("whole"), tp_size=2)
    return tree(origin.with_name("whole"))


def unfinished(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{out.name}.part-*"))


@pytest.fixture
def half(origin: Path, tmp_path: Path) -> Iterator[Path]:
    """The destination of a conversion that was interrupted after nine tensors."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            reshard.convert(origin, tmp_path / "out", tp_size=2, workers=1)
    yield tmp_path / "out"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out"]


def tensors_written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that receives each tensor journaled from now on."""
    real, seen = Journal.add, []

    def add(self: Journal, file: str, tensor: str, digest: str) -> None:
        seen.append(tensor)
        real(self, file, tensor, digest)

    monkeypatch.setattr(Journal, "add", add)
    return seen


def total_tensors(whole: dict[str, object]) -> int:
    manifest = json.loads(whole["reshard.json"])  # type: ignore[arg-type]
    return 2 * len(manifest["parameters"])


@pytest.mark.fault(1, 3, 29)
def test_an_interrupted_conversion_goes_on(
    half: Path, origin: Path, whole: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not half.exists()
    assert len(unfinished(half)) == 1
    seen = tensors_written(monkeypatch)
    reshard.convert(origin, half, tp_size=2, workers=3)
    assert len(seen) == total_tensors(whole) - 9
    assert tree(half) == whole


@pytest.mark.fault(29)
@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("block_bytes", [100, 1 << 20])
def test_the_bytes_are_the_same(
    block_bytes: int, workers: int, origin: Path, tmp_path: Path, whole: dict[str, object]
) -> None:
    """The bytes depend on neither threads nor block size, nor on an earlier run with others of both."""
    for begun in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if begun:
                interrupt_after(patch, 5 * workers)
                with pytest.raises(KeyboardInterrupt):
                    reshard.convert(origin, tmp_path / "begun", tp_size=2, workers=3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(executor, "BLOCK_BYTES", block_bytes)
            reshard.convert(origin, tmp_path / "begun" if begun else tmp_path / "out", tp_size=2, workers=workers)
    assert tree(tmp_path / "out") == tree(tmp_path / "begun") == whole


@pytest.mark.fault(2)
def test_what_a_journal_claims_is_checked(
    half: Path, origin: Path, whole: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power loss the journal's line may be there without the data."""
    [part] = unfinished(half)
    with open(part / RANK_FILES[0], "r+b") as file:
        file.seek(4096)
        file.write(bytes(os.stat(part / RANK_FILES[0]).st_size - 4096))
    lost = sum(RANK_FILES[0] in line for line in (part / JOURNAL_NAME).read_text().splitlines())
    assert lost
    seen = tensors_written(monkeypatch)
    reshard.convert(origin, half, tp_size=2)
    assert len(seen) == total_tensors(whole) - 9 + lost
    assert tree(half) == whole


@pytest.mark.fault(1, 2)
@pytest.mark.parametrize("damage", ["torn", "flipped", "garbage", "empty", "missing", "shorter files", "longer files"])
def test_a_damaged_journal_or_folder(damage: str, half: Path, origin: Path, whole: dict[str, object]) -> None:
    [part] = unfinished(half)
    journal = part / JOURNAL_NAME
    text = journal.read_bytes()
    if damage == "torn":
        journal.write_bytes(text[:-5])
    elif damage == "flipped":
        journal.write_bytes(text[:40] + bytes([text[40] ^ 1]) + text[41:])
    elif damage == "garbage":
        journal.write_bytes(os.urandom(3000))
    elif damage == "empty":
        journal.write_bytes(b"")
    elif damage == "missing":
        journal.unlink()
    else:
        for name in RANK_FILES:
            os.truncate(part / name, 5000 if damage == "shorter files" else 10_000_000)
    reshard.convert(origin, half, tp_size=2)
    assert tree(half) == whole


def test_other_work_starts_anew(half: Path, origin: Path) -> None:
    reshard.convert(origin, half, tp_size=4)
    assert len(list(half.glob("shard-*"))) == 4


def test_a_source_that_changed_starts_anew(half: Path, origin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(origin, half.with_name("copy"))
    os.utime(next(copy.glob("*.safetensors")), ns=(1, 1))
    seen = tensors_written(monkeypatch)
    manifest = reshard.convert(copy, half, tp_size=2)
    assert len(seen) == 2 * len(manifest.parameters)


@pytest.mark.fault(12)
def test_links_planted_in_the_unfinished_folder_are_not_followed(
    half: Path, origin: Path, whole: dict[str, object]
) -> None:
    [part] = unfinished(half)
    precious = half.with_name("precious")
    precious.write_text("mine")
    (part / RANK_FILES[1]).unlink()
    (part / RANK_FILES[1]).symlink_to(precious)
    with pytest.raises(StorageError, match="symbolic link"):
        reshard.convert(origin, half, tp_size=2)
    [part] = unfinished(half)
    (part / RANK_FILES[1]).unlink()
    os.link(precious, part / RANK_FILES[1])
    with pytest.raises(StorageError, match="not a file of this command"):
        reshard.convert(origin, half, tp_size=2)
    [part] = unfinished(half)
    (part / RANK_FILES[1]).unlink()
    (part / "config.json").symlink_to(precious)
    reshard.convert(origin, half, tp_size=2)
    assert precious.read_text() == "mine"
    assert tree(half) == whole
    precious.unlink()


def test_the_user_is_told(source: Path, out: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        result = cli(*convert(source, out))
    assert result.code == 130
    assert "Error: interrupted" in result.err.splitlines()
    assert "the same command goes on with what is in" in result.hint
    assert str(unfinished(out)[0]) in result.hint
    assert cli(*convert(source, out)).code == 0
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


@pytest.mark.fault(5)
def test_a_full_disk_goes_on_when_there_is_room(
    origin: Path, tmp_path: Path, whole: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [6]
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if offset and not left[0]:
            raise OSError(28, os.strerror(28))
        left[0] -= bool(offset)
        return real(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(StorageError, match="No space left") as refused:
            reshard.convert(origin, tmp_path / "out", tp_size=2, workers=1)
    assert "goes on" in str(refused.value.hint)
    seen = tensors_written(monkeypatch)
    reshard.convert(origin, tmp_path / "out", tp_size=2)
    assert len(seen) == total_tensors(whole) - 6
    assert tree(tmp_path / "out") == whole


@pytest.mark.fault(6)
def test_nothing_is_kept_of_a_disk_that_failed(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fsync the cache still shows the written data, and a second fsync would report success."""

    def fsync(_: int) -> None:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError, match="Input/output error"):
        reshard.convert(origin, tmp_path / "out", tp_size=2)
    assert os.listdir(tmp_path) == []


@pytest.mark.fault(15)
def test_nothing_is_kept_of_a_source_that_changed_meanwhile(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(origin, tmp_path / "source")
    real = Journal.add

    def add(self: Journal, *arguments: str) -> None:
        os.utime(next(copy.glob("*.safetensors")), ns=(1, 1))
        real(self, *arguments)

    monkeypatch.setattr(Journal, "add", add)
    with pytest.raises(IntegrityError, match="changed"):
        reshard.convert(copy, tmp_path / "out", tp_size=2)
    assert os.listdir(tmp_path) == ["source"]


def bytes_of(path: Path, info: TensorInfo) -> bytes:
    return path.read_bytes()[info.start : info.end]


def sweep(origin: Path, root: Path, whole: dict[str, object], step: int, **options: Any) -> int:
    """Kill a conversion before and after every `step`-th call, then run it again. Returns the number of kills."""
    context = server()
    code, calls, everything = convert_until(context, origin, root / "whole", **options)
    assert code == 0
    assert tree(root / "whole") == whole
    kills = 0
    for call, after in itertools.product(range(1, calls + 1, step), (False, True)):
        out = root / f"{call}-{after}"
        code, made, _ = convert_until(context, origin, out, call=call, after=after, **options)
        # Reading ahead makes a call or two fewer if the work overtakes it.
        assert code == KILLED or (code == 0 and made < call), (call, after, made)
        kills += code == KILLED
        if out.exists():  # all or nothing
            assert tree(out) == whole, (call, after)
            with pytest.raises(DestinationExistsError):
                reshard.convert(origin, out, tp_size=2, **options)
        else:
            code, _, written = convert_until(context, origin, out, **options)
            assert code == 0, (call, after)
            assert written <= everything
            assert tree(out) == whole, (call, after)
        assert not unfinished(out)
    return kills


@pytest.mark.fault(1)
def test_killed_at_any_call(origin: Path, tmp_path: Path, whole: dict[str, object]) -> None:
    assert sweep(origin, tmp_path, whole, STEP) > 20


@pytest.mark.fault(1)
@pytest.mark.slow
def test_killed_at_every_call(origin: Path, tmp_path: Path, whole: dict[str, object]) -> None:
    print(sweep(origin, tmp_path, whole, 1), "kills")


NESTED: dict[str, Any] = {"quantize": "nf4", "quantize_config": {"bnb_4bit_use_double_quant": True}}


@pytest.mark.fault(1)
@pytest.mark.parametrize("step", [97, pytest.param(STEP, marks=pytest.mark.slow)])
def test_killed_while_it_quantizes(step: int, origin: Path, tmp_path: Path) -> None:
    """Also in the pass before the planning, and while the digests of what was quantized are found."""
    reshard.convert(origin, tmp_path / "expected", tp_size=2, **NESTED)
    (tmp_path / "swept").mkdir()
    assert sweep(origin, tmp_path / "swept", tree(tmp_path / "expected"), step, **NESTED) > 8


@pytest.mark.fault(3)
def test_what_another_quantization_wrote_is_not_taken(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option that changes no shape and no name: the modules' own dtype for computing is in config.json alone."""
    with interrupted_after(9):
        reshard.convert(origin, tmp_path / "out", tp_size=2, workers=1, **NESTED)
    assert len(unfinished(tmp_path / "out")) == 1
    other = {**NESTED["quantize_config"], "bnb_4bit_compute_dtype": "float16"}
    seen = tensors_written(monkeypatch)
    made = reshard.convert(origin, tmp_path / "out", tp_size=2, quantize="nf4", quantize_config=other)
    assert len(seen) == sum(len(record.tensors) for record in made.rank_files)
    assert not unfinished(tmp_path / "out")


@pytest.mark.fault(3)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_at_most_one_tensor_of_a_writer_is_done_again(
    share: float, origin: Path, tmp_path: Path, whole: dict[str, object]
) -> None:
    """Every tensor written is claimed, but for the one that the kill met, and no claimed tensor is written again."""
    context = server()
    _, calls, everything = convert_until(context, origin, tmp_path / "whole")
    out = tmp_path / "out"
    convert_until(context, origin, out, call=round(share * calls))
    [part] = unfinished(out)
    claims = {tuple(json.loads(line[:-17])[:2]) for line in (part / JOURNAL_NAME).read_text().splitlines()}
    there, claimed = 0, 0
    for name in RANK_FILES:
        for info in read_header(tmp_path / "whole" / name, file=name).tensors:
            if (name, info.name) in claims:
                claimed += info.nbytes
            there += bytes_of(part / name, info) == bytes_of(tmp_path / "whole" / name, info)
    assert len(claims) <= there <= len(claims) + 1
    code, _, written = convert_until(context, origin, out)
    assert code == 0
    assert written == everything - claimed
    assert tree(out) == whole


@pytest.mark.fault(1)
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize(
    "call",
    ["pwrite64:signal=SIGKILL:when=5", pytest.param("fsync:signal=SIGKILL:when=2", marks=pytest.mark.slow)],
)
def test_a_real_kill(call: str, origin: Path, tmp_path: Path, whole: dict[str, object]) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "reshard", "convert", str(origin), str(out), "--tp-size", "2"]
    trace = [
        "strace",
        "-f",
        "-qq",
        "-o",
        os.devnull,
        "-e",
        "trace=pwrite64,fsync",
        "-e",
        f"inject={call}",
    ]
    probe = subprocess.run([*trace, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"strace: {probe.stderr.strip()}")
    killed = subprocess.run([*trace, *command], capture_output=True, timeout=120)
    assert killed.returncode in (-9, 137)
    assert not out.exists()
    assert unfinished(out)
    command[0] = warm_commands.python()
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    assert tree(out) == whole
    assert not unfinished(out)

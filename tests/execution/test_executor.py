"""The executor writes what torch computes, block by block, in bounded memory."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from cutting import bits, oracle, random_bits, same
from executor_tools import load, make_source, simple_job, taken_whole
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from symbolic_programs import programs, run

from reshard.checkpoint.source import open_source
from reshard.errors import IntegrityError
from reshard.execution import executor
from reshard.execution import reader as reader_module
from reshard.execution.executor import Inputs, write_files
from reshard.execution.reader import equal_tensors
from reshard.files import digest as digest_module
from reshard.files.digest import DigestsAhead, digest_file, digest_of
from reshard.files.dtypes import CODES, NAMES
from reshard.files.header import read_header
from reshard.resharded.layout import file_layout
from reshard.resharded.targets import LocalTensor, Target, rank_tensors
from reshard.sharding.placement import PackedShard, Placement, Replicate, Shard
from reshard.sharding.regions import Region, covers, whole
from reshard.strategies.symbolic import RegionTensor

DTYPES = ["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "bool", "int64", "float64", "int16"]
MEMORY_LIMIT = 100 << 20  # bytes of anonymous memory above the start
BIG = (12_000, 12_500)  # float32: 600 MB


@st.composite
def placements(draw: st.DrawFn, shape: Sequence[int]) -> Placement:
    if not shape or draw(st.integers(0, 4)) == 0:
        return Replicate()
    dim = draw(st.integers(0, len(shape) - 1))
    count = draw(st.sampled_from([n for n in (1, 2, 3, 4) if shape[dim] % n == 0]))
    return Shard(dim) if count == 1 else PackedShard(dim, (shape[dim] // count,) * count)


@st.composite
def parameters(draw: st.DrawFn, number: int) -> tuple[torch.Tensor, Target, torch.Tensor]:
    """Draw a source tensor, a parameter made of it by some copies, and torch's result of the same copies."""
    shape, steps = draw(programs())
    name = draw(st.sampled_from(DTYPES))
    data = random_bits(shape, getattr(torch, name), number)
    expected, symbolic = bits(data), RegionTensor.of_source(f"source.{number}", shape, data.dtype)
    for step in steps:
        expected, symbolic = run(expected, step), run(symbolic, step)
    where = draw(placements(tuple(expected.shape)))
    target = Target(f"target.{number}", tuple(expected.shape), name, where, symbolic.regions)
    return data, target, expected.contiguous().view(data.dtype)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_bytes_are_torchs(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Copies, placements, dtypes, ranks, blocks and workers are random, and so is who copies, Python or torch; digests
    are of the bytes on disk."""
    root = tmp_path_factory.mktemp("plan")
    made = [data.draw(parameters(i)) for i in range(data.draw(st.integers(1, 4)))]
    half = len(made) // 2
    groups = [group for group in (made[:half], made[half:]) if group]
    source = make_source(root, *({target.regions[0].source: t for t, target, _ in group} for group in groups))
    world_size = data.draw(st.integers(1, 4))
    layouts = [
        file_layout(f"{rank}.safetensors", rank_tensors([t for _, t, _ in made], rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "BLOCK_BYTES", data.draw(st.sampled_from([8, 24, 64, 100, 1 << 20])))
        patch.setattr(reader_module, "_torch_is_here", partial(bool, data.draw(st.booleans())))
        patch.setattr(reader_module, "_FEW", data.draw(st.sampled_from([0, 20, 1 << 20])))
        patch.setattr(reader_module, "_LONG", data.draw(st.sampled_from([8, 1 << 20])))
        written, digests = write_files(root, layouts, Inputs(source), workers=data.draw(st.integers(1, 3)))

    for rank, evidence in enumerate(written):
        path = root / evidence.name
        found = load(path)
        for _, target, expected in made:
            part = oracle(bits(expected), target.placement, rank, world_size).contiguous().view(expected.dtype)
            assert same(found[target.name], part)
        content = path.read_bytes()
        assert evidence.size == len(content)
        for info in read_header(path, file="x").tensors:
            assert evidence.tensors[info.name] == digest_of(content[info.start : info.end])
    assert digests == {file.name: digest_file(file.path) for file in source.files}


@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
@pytest.mark.parametrize(
    ("have", "want"),
    [("float32", "bfloat16"), ("bfloat16", "float32"), ("float64", "float16"), ("float16", "bfloat16")],
)
def test_casts_are_those_of_tensor_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, have: str, want: str
) -> None:
    """Data is taken straight, gathered (transposed) and sharded. Overflow becomes infinite; NaNs stay NaNs.

    torch decides which NaN: its vectorised cast to bfloat16 gives another one than its strided cast.
    """
    monkeypatch.setattr(executor, "BLOCK_BYTES", block_bytes)
    tensor = torch.randn(37, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tensor[0, :6] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-41, 65519.0, 3.4e38])
    tensor = tensor.to(getattr(torch, have))
    source = make_source(tmp_path, {"x": tensor})
    turned = RegionTensor.of_source("x", (37, 11), tensor.dtype).transpose(0, 1)
    (shard,) = rank_tensors([Target("shard", (37, 11), want, Shard(1), whole("x", (37, 11)))], rank=1, world_size=2)
    tensors = [
        LocalTensor("plain", (37, 11), want, (0, 0), whole("x", (37, 11))),
        LocalTensor("turned", (11, 37), want, (0, 0), turned.regions),
        shard,
    ]
    write_files(tmp_path, [file_layout("out.safetensors", tensors)], Inputs(source))
    found = load(tmp_path / "out.safetensors")
    expected = tensor.to(getattr(torch, want))
    assert same(found["plain"], expected)
    for name, part in (("turned", expected.T), ("shard", expected[:, 6:])):
        assert torch.equal(found[name].isnan(), part.isnan())
        assert same(found[name].nan_to_num(7), part.nan_to_num(7))


def test_a_fusion_of_sources_of_several_dtypes_is_cast(tmp_path: Path) -> None:
    one, other = torch.randn(3, 4), torch.randn(2, 4).bfloat16()
    source = make_source(tmp_path, {"one": one, "other": other})
    regions = (*whole("one", (3, 4)), Region("other", 0, (4, 1), (2, 4), (3, 0)))
    assert covers(regions, (5, 4))
    layout = file_layout("out.safetensors", [LocalTensor("fused", (5, 4), "float32", (0, 0), regions)])
    write_files(tmp_path, [layout], Inputs(source))
    assert same(load(tmp_path / "out.safetensors")["fused"], torch.cat([one, other.float()]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scalars_and_empty_tensors(tmp_path: Path, dtype: str) -> None:
    shapes = [(), (0,), (1,), (3, 0, 2), (1, 1, 1)]
    tensors = {str(shape): random_bits(shape, getattr(torch, dtype)) for shape in shapes}
    source = make_source(tmp_path, tensors)
    (evidence,), _ = write_files(tmp_path, [file_layout("out.safetensors", taken_whole(source))], Inputs(source))
    found = load(tmp_path / "out.safetensors")
    assert set(evidence.tensors) == set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        assert same(found[name], tensor)


def test_unaligned_source_data(tmp_path: Path) -> None:
    """Files by other writers may put a tensor at any byte; it is still read as it is, gathered and cast."""
    tensor = torch.randn(5, 6, dtype=torch.float64)
    raw = tensor.numpy().tobytes()
    entries = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "x": {"dtype": "F64", "shape": [5, 6], "data_offsets": [3, 3 + len(raw)]},
    }
    head = json.dumps(entries).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + b"abc" + raw)
    source = open_source(tmp_path)
    assert source.tensors["x"].start % 8
    turned = RegionTensor.of_source("x", (5, 6), torch.float64).transpose(0, 1).regions
    tensors = [
        *taken_whole(source),
        LocalTensor("turned", (6, 5), "float64", (0, 0), turned),
        LocalTensor("cast", (5, 6), "bfloat16", (0, 0), whole("x", (5, 6))),
    ]
    write_files(tmp_path, [file_layout("out.safetensors", tensors)], Inputs(source))
    found = load(tmp_path / "out.safetensors")
    assert same(found["x"], tensor)
    assert same(found["turned"], tensor.T)
    assert same(found["cast"], tensor.bfloat16())


@pytest.mark.parametrize("code", sorted(CODES.values()))
def test_every_dtype_is_gathered(tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are compared, also for dtypes without torch kernels and those that safetensors does not hand out."""
    monkeypatch.setattr(executor, "BLOCK_BYTES", 64)
    width = getattr(torch, NAMES[code]).itemsize
    raw = random_bits((7, 6, width), torch.uint8)
    head = json.dumps({"x": {"dtype": code, "shape": [7, 6], "data_offsets": [0, raw.numel()]}}).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + raw.numpy().tobytes())
    turned = RegionTensor.of_source("x", (7, 6), torch.int8).transpose(0, 1).regions
    layout = file_layout("out.safetensors", [LocalTensor("t", (6, 7), NAMES[code], (0, 0), turned)])
    write_files(tmp_path, [layout], Inputs(open_source(tmp_path)))
    content = (tmp_path / "out.safetensors").read_bytes()
    assert content[layout.slots[0].offset :] == raw.transpose(0, 1).contiguous().numpy().tobytes()


@pytest.mark.fault(29)
def test_worker_count_does_not_change_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "BLOCK_BYTES", 64)
    source, tensors = simple_job(tmp_path, files=3)
    results = []
    for workers in (1, 2, 7):
        out = tmp_path / str(workers)
        out.mkdir()
        evidence = write_files(out, [file_layout("out.safetensors", tensors)], Inputs(source), workers=workers)
        results.append((evidence, (out / "out.safetensors").read_bytes()))
    assert results[0] == results[1] == results[2]


def test_progress_adds_up_to_the_data(tmp_path: Path) -> None:
    source, tensors = simple_job(tmp_path)
    told: list[int] = []
    write_files(tmp_path, [file_layout("out.safetensors", tensors)], Inputs(source), workers=1, progress=told.append)
    assert sum(told) == sum(tensor.nbytes for tensor in tensors)


def test_equal_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "BLOCK_BYTES", 64)
    x = torch.randn(9, 5)
    y = x.clone()
    y[-1, -1] += 1
    nan = torch.full((3,), float("nan"))
    tensors = {"x": x, "same": x.clone(), "last": y, "flat": x.flatten().clone(), "int": x.view(torch.int32).clone()}
    empty = {"e": torch.zeros(0, 3), "f": torch.zeros(0, 3), "nan": nan, "nan2": nan.clone(), "s": torch.tensor(1.0)}
    source = make_source(tmp_path, {**tensors, **empty})
    assert equal_tensors(source, "x", "same")
    assert equal_tensors(source, "e", "f")
    assert equal_tensors(source, "nan", "nan2")  # the same bytes
    assert equal_tensors(source, "s", "s")
    assert not any(equal_tensors(source, "x", other) for other in ("last", "flat", "int", "e"))


def test_blocks_never_exceed_the_buffer(tmp_path: Path) -> None:
    """Blocks come in order and without a gap, each at most the buffer, even if runs come straight from the mapping."""
    source = make_source(tmp_path, {"x": torch.randn(40, 30)})
    target = Target("x", (40, 30), "float32", Shard(1), whole("x", (40, 30)))
    buffer = memoryview(bytearray(256))
    for tensor in (*taken_whole(source), *rank_tensors([target], rank=1, world_size=3)):
        with reader_module.SourceReader(source) as reader:
            at = 0
            for offset, block in reader_module.tensor_blocks(tensor, reader, buffer):
                assert offset == at
                assert 0 < len(block) <= 256
                at += len(block)
            assert at == tensor.nbytes


def convert_big(folder: Path) -> None:
    """Print by how many bytes anonymous memory grew at most; runs in a process of its own."""
    shape, count = BIG, math.prod(BIG) * 4
    head = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, count]}}).encode()
    (folder / "config.json").write_text("{}")
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + count)
    source = open_source(folder)
    targets = [Target("x", shape, "float32", Shard(1), whole("x", shape))]
    layouts = [file_layout(f"{r}.safetensors", rank_tensors(targets, rank=r, world_size=2)) for r in range(2)]
    seen, stop = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            seen.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    write_files(folder, layouts, Inputs(source))
    stop.set()
    watcher.join()
    assert len(seen) > 10
    print(max(seen) - seen[0])


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """600 MB are gathered over two ranks. Only anonymous memory counts: file pages belong to the cache."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < MEMORY_LIMIT
    finally:
        for path in tmp_path.glob("*.safetensors"):
            path.unlink()


if __name__ == "__main__":
    convert_big(Path(sys.argv[1]))


def test_digests_made_ahead_are_those_of_the_files(tmp_path: Path) -> None:
    """Digests that were begun are taken as they are; the other files are digested after the cut."""
    source, tensors = simple_job(tmp_path, files=3)
    paths = {file.name: file.path for file in source.files}
    for count in range(4):
        with DigestsAhead(dict(list(paths.items())[:count])) as ahead:
            for name in list(paths)[:count]:
                assert ahead.get(name) == digest_file(paths[name])
            folder = tmp_path / str(count)
            folder.mkdir()
            _, found = write_files(folder, [file_layout("out.safetensors", tensors)], Inputs(source, ahead=ahead))
        assert found == {name: digest_file(path) for name, path in paths.items()}


def test_a_digest_ahead_that_was_not_begun_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(path: Path) -> str:
        begun.set()
        assert go_on.wait(30)
        return f"digest of {path}"

    monkeypatch.setattr(digest_module, "digest_file", slow)
    with DigestsAhead({"first": Path("one"), "last": Path("two")}) as ahead:
        assert begun.wait(30)
        ahead.no_more()
        go_on.set()
        assert ahead.get("last") is None
        assert ahead.get("first") == "digest of one"


def test_a_file_that_cannot_be_read_ahead(tmp_path: Path) -> None:
    with DigestsAhead({"gone": tmp_path / "gone"}) as ahead, pytest.raises(IntegrityError, match="gone"):
        ahead.get("gone")

"""A rank file in memory, mapped or read onto a device: the bytes that were written, whatever is still under way."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from executor_tools import load, make_source, taken_whole

from reshard.errors import IntegrityError, TopologyError
from reshard.execution.executor import Inputs, write_files
from reshard.files.header import TensorInfo
from reshard.resharded.layout import file_layout
from reshard.resharded.rank_file import FileRecord, check_digests, read_rank_header
from runtime.loading import pinned as reading
from runtime.loading.mapped import map_rank_file

Bring = Callable[..., Callable[[], dict[str, torch.Tensor]]]


class Postman:
    """A copy to a device that happens only once somebody waits for it: the latest moment at which a device may read."""

    sent = 0

    def __init__(self, target: torch.Tensor, piece: torch.Tensor) -> None:
        self.target, self.piece = target, piece
        Postman.sent += 1

    def synchronize(self) -> None:
        self.target.copy_(self.piece)


def lazily(patch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> Callable[[], dict[str, torch.Tensor]]:
    patch.setattr(reading._Lane, "_send", lambda self, target, piece: Postman(target, piece))
    return reading.read_rank_file(*arguments[:2], torch.device("cpu"), *arguments[2:], **options)


def at_once(*arguments: Any, **options: Any) -> Callable[[], dict[str, torch.Tensor]]:
    return reading.read_rank_file(*arguments[:2], torch.device("cpu"), *arguments[2:], **options)


@pytest.fixture(params=["mapped", "read", "read by a lazy device"])
def bring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bring:
    monkeypatch.setattr(reading, "BUFFER_BYTES", 64)  # so that small tensors take many pieces
    return {"mapped": map_rank_file, "read": at_once}.get(request.param, partial(lazily, monkeypatch))


@pytest.fixture(params=[1, 3])
def pool(request: pytest.FixtureRequest) -> Iterator[Executor]:
    with ThreadPoolExecutor(request.param) as pool:
        yield pool


def written(tmp_path: Path) -> tuple[Path, FileRecord]:
    tensors = {
        "matrix": torch.randn(33, 17),
        "half": torch.randn(5, 7).to(torch.bfloat16),
        "eighth": torch.randn(65).to(torch.float8_e4m3fn),
        "whole": torch.arange(40, dtype=torch.int64),
        "flags": torch.tensor([True, False, True]),
        "number": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
    }
    source = make_source(tmp_path / "source", tensors)
    layout = file_layout("rank.safetensors", taken_whole(source))
    [record], _ = write_files(tmp_path, [layout], Inputs(source), sync=False)
    return tmp_path / "rank.safetensors", record


@pytest.mark.parametrize("digests", [True, False])
def test_every_tensor_arrives_bit_for_bit(bring: Bring, pool: Executor, digests: bool, tmp_path: Path) -> None:
    path, record = written(tmp_path)
    found, expected = bring(path, record, pool, digests=digests)(), load(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_the_lazy_device_was_asked(pool: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this test, the one above could pass without ever sending anything lazily."""
    monkeypatch.setattr(reading, "BUFFER_BYTES", 64)
    path, record = written(tmp_path)
    before = Postman.sent
    lazily(monkeypatch, path, record, pool, digests=False)()
    sizes = [info.nbytes for info in read_rank_header(path, record).tensors]
    assert Postman.sent - before == sum(-(-size // 64) for size in sizes)


@pytest.mark.fault(20)
@pytest.mark.parametrize("name", ["matrix", "eighth", "number"])
def test_an_altered_byte_is_found_and_its_tensor_named(bring: Bring, pool: Executor, name: str, tmp_path: Path) -> None:
    path, record = written(tmp_path)
    info = next(info for info in read_rank_header(path, record).tensors if info.name == name)
    data = bytearray(path.read_bytes())
    data[info.end - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=f"tensor {name} was altered"):
        bring(path, record, pool, digests=True)()
    assert bring(path, record, pool, digests=False)().keys() == record.tensors.keys()


@pytest.mark.fault(20)
def test_an_altered_header_is_found(bring: Bring, pool: Executor, tmp_path: Path) -> None:
    path, record = written(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'{"format":"pt"}', b'{"format":"tp"}'))
    with pytest.raises(IntegrityError, match="its header was altered"):
        bring(path, record, pool, digests=True)()


@pytest.mark.fault(21)
def test_other_tensors_than_were_written(bring: Bring, pool: Executor, tmp_path: Path) -> None:
    path, record = written(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"matrix"', b'"Matrix"'))
    with pytest.raises(IntegrityError, match="does not hold the tensors that were written"):
        bring(path, record, pool, digests=False)


@pytest.mark.fault(20)
def test_a_file_cut_short_while_it_is_read(pool: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, record = written(tmp_path)
    header = read_rank_header(path, record)
    os.truncate(path, header.data_start + 10)
    monkeypatch.setattr(reading, "read_rank_header", lambda *_: header)
    with pytest.raises(IntegrityError, match="was cut short, while it was being read"):
        at_once(path, record, pool, digests=True)()


def test_a_device_without_room(pool: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError

    path, record = written(tmp_path)
    monkeypatch.setattr(torch, "empty", full)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (1000, 2000))
    with pytest.raises(TopologyError, match=r"needs [\d,]+ bytes on cpu, where 1,000 are free"):
        at_once(path, record, pool, digests=True)


def test_tensors_in_one_allocation_do_not_touch() -> None:
    sizes = [0, 1, 255, 256, 257, 4096]
    begins, total = reading.offsets(TensorInfo(str(n), "U8", (n,), "f", 0, n) for n in sizes)
    spans = sorted((begins[str(n)], begins[str(n)] + n) for n in sizes)
    assert all(begin % reading.ALIGNMENT == 0 for begin, _ in spans)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert total == 4096 + 256 * 5


def test_digests_are_checked_in_file_order(tmp_path: Path) -> None:
    path, record = written(tmp_path)
    header = read_rank_header(path, record)
    check_digests(path, record, header, dict(reversed(record.tensors.items())))

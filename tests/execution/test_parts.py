"""The shares of parts: every file once, every source file digested once, and no byte read that is not in the spans."""

from __future__ import annotations

from pathlib import Path

import pico
import pytest
import torch
from executor_tools import make_source
from hypothesis import given, settings
from hypothesis import strategies as st

import reshard
from reshard.checkpoint.source import Source, open_source
from reshard.errors import UsageError
from reshard.execution.executor import Inputs, write_files
from reshard.execution.parts.share import Part, ranks_of, share_of
from reshard.planning.plan import plan_layouts
from reshard.resharded.layout import FileLayout, file_layout
from reshard.resharded.targets import LocalTensor
from reshard.sharding.regions import Region


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/2/3", "-1/2", "1/0", "a/b", "1/2 ", "123456/123456"])
def test_no_part(text: str) -> None:
    with pytest.raises(ValueError, match="is no part such as 3/8"):
        Part.parse(text)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 80), st.data())
def test_every_rank_is_in_one_part(world_size: int, data: st.DataObject) -> None:
    of = data.draw(st.integers(1, world_size))
    shares = [ranks_of(Part(number, of), world_size) for number in range(1, of + 1)]
    assert [rank for share in shares for rank in share] == list(range(world_size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with pytest.raises(UsageError, match="parts of"):
        ranks_of(Part(1, world_size + 1), world_size)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("of", [1, 2, 3, 4])
def test_every_file_is_in_one_share(family: str, of: int, tmp_path: Path) -> None:
    plan = reshard.plan(pico.save(family, tmp_path / "source"), tp_size=4)
    layouts = plan_layouts(plan)
    shares = [share_of(Part(number, of), layouts, 4, plan.source) for number in range(1, of + 1)]
    assert sorted(layout.name for share in shares for layout in share.layouts) == sorted(x.name for x in layouts)
    digested = [name for share in shares for name in share.digested]
    assert sorted(digested) == sorted(file.name for file in plan.source.files)
    for share in shares:
        assert share.written == sum(layout.size for layout in share.layouts)
        assert all(share.spans[name] == ((0, plan.source.file(name).size),) for name in share.digested)


def test_unused_tensors_are_written_by_one_part(tmp_path: Path) -> None:
    values = {"a": torch.zeros(4, 4, dtype=torch.uint8)}
    source = make_source(tmp_path / "source", values)
    of_rank = [_cut(str(rank), values, 0, 0, 4 - rank) for rank in range(4)]  # the last is the smallest
    unused = _cut("unused", values, 0, 0, 1)
    shares = [share_of(Part(number, 2), [*of_rank, unused], 4, source) for number in (1, 2)]
    assert [[layout.name for layout in share.layouts] for share in shares] == [["0", "1"], ["2", "3", "unused"]]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_no_byte_outside_the_spans_is_read(ranks: int, dim: int, tmp_path: Path) -> None:
    """A part writes the same if all other bytes are changed. Of a cut of rows it reads its own, else everything."""
    shape = (37, 1 << 17)  # larger than the gaps that are read too
    values = {f"{i}": torch.randint(0, 255, shape, dtype=torch.uint8) for i in range(3)}
    source = make_source(tmp_path / "source", values, {"other": torch.zeros(3)})
    bounds = [rank * shape[dim] // ranks for rank in range(ranks + 1)]
    layouts = [_cut(str(rank), values, dim, *bounds[rank : rank + 2]) for rank in range(ranks)]
    shares = [share_of(Part(rank + 1, ranks), layouts, ranks, source) for rank in range(ranks)]
    [big, _] = source.files
    share = next(share for share in shares if big.name not in share.digested)
    assert share.read < big.size if dim == 0 else share.read >= big.size
    before = _written(tmp_path / "before", share.layouts[0], source)

    data = bytearray(big.path.read_bytes())
    kept = {(start, end): bytes(data[start:end]) for start, end in share.spans[big.name]}
    data[big.header.data_start :] = bytes(255 - byte for byte in data[big.header.data_start :])
    for (start, end), piece in kept.items():
        data[start:end] = piece
    big.path.write_bytes(data)
    assert _written(tmp_path / "after", share.layouts[0], open_source(tmp_path / "source")) == before


def _cut(name: str, values: dict[str, torch.Tensor], dim: int, start: int, end: int) -> FileLayout:
    tensors = []
    for tensor, value in values.items():
        shape = tuple(end - start if at == dim else size for at, size in enumerate(value.shape))
        region = Region(tensor, start * value.stride(dim), value.stride(), shape, (0, 0))
        tensors.append(LocalTensor(tensor, shape, "uint8", (0, 0), (region,)))
    return file_layout(name, tensors)


def _written(folder: Path, layout: FileLayout, source: Source) -> bytes:
    folder.mkdir()
    write_files(folder, [layout], Inputs(source, digested=()), workers=1, sync=False)
    return (folder / layout.name).read_bytes()

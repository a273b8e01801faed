"""RegionTensor against torch itself: the regions of a result, read from real data, are torch's result."""

import pytest
import torch
from hypothesis import given, settings
from symbolic_programs import programs, run

from reshard.sharding.regions import covers
from reshard.strategies.symbolic import NotACopyError, RegionTensor, casts_left_to_the_copy


def materialise(tensor: RegionTensor, sources: dict[str, torch.Tensor]) -> torch.Tensor:
    out = torch.full(tuple(tensor.shape), -1)
    for r in tensor.regions:
        view = torch.as_strided(sources[r.source], r.extent, r.strides, r.offset)
        out[tuple(slice(s, s + e) for s, e in zip(r.target_start, r.extent))] = view
    return out


def test_stacked_and_concatenated_experts() -> None:
    gates = [torch.arange(12).reshape(3, 4) + 100 * i for i in range(4)]
    ups = [gate + 50 for gate in gates]
    sources = {f"g{i}": t for i, t in enumerate(gates)} | {f"u{i}": t for i, t in enumerate(ups)}

    def symbolic(prefix: str) -> RegionTensor:
        return torch.stack([RegionTensor.of_source(f"{prefix}{i}", (3, 4), torch.int64) for i in range(4)], dim=0)

    fused = torch.cat([symbolic("g"), symbolic("u")], dim=1)
    assert covers(fused.regions, (4, 6, 4))
    assert len(fused.regions) == 8
    assert torch.equal(materialise(fused, sources), torch.cat([torch.stack(gates), torch.stack(ups)], dim=1))


@settings(max_examples=400, deadline=None)
@given(programs())
def test_any_chain_of_copies_equals_torch(program) -> None:
    shape, steps = program
    data = torch.arange(torch.Size(shape).numel()).reshape(shape)
    expected, symbolic = data, RegionTensor.of_source("x", shape, torch.int64)
    for step in steps:
        expected, symbolic = run(expected, step), run(symbolic, step)
    assert tuple(symbolic.shape) == tuple(expected.shape)
    assert covers(symbolic.regions, tuple(symbolic.shape))
    assert torch.equal(materialise(symbolic, {"x": data}), expected)


def test_interleave_is_two_regions() -> None:
    tensor = RegionTensor.of_source("x", (8, 3), torch.int64)
    tensor = tensor.reshape(4, 2, 3).transpose(0, 1).reshape(8, 3)
    assert len(tensor.regions) == 2


def test_computing_is_refused() -> None:
    tensor = RegionTensor.of_source("x", (4, 4), torch.float32)
    with pytest.raises(NotACopyError):
        torch.add(tensor, tensor)
    with pytest.raises(NotACopyError):
        tensor.to(torch.int32)


def test_a_cast_between_floating_dtypes_is_left_to_the_copy() -> None:
    """A cast keeps the elements; the dtype matters only where they are stored."""
    tensor = RegionTensor.of_source("x", (4, 4), torch.float32)
    with casts_left_to_the_copy():
        half, brain = tensor.to(torch.float16), tensor.to(torch.bfloat16)
    assert half.regions == tensor.regions
    assert half.dtype == torch.float16
    with pytest.raises(NotACopyError, match="cast from"):
        tensor.to(torch.float16)
    mixed = torch.cat([brain, half])
    assert (mixed.dtype, len(mixed.regions)) == (torch.float32, 2)

"""Run under torchrun: seeded random tensors must be cut the same by us and by DTensor, on every rank.

Any difference is an assertion, hence a non-zero exit. Rank 0 prints how many cases were compared.
"""

import itertools
import os
import random
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from reshard.sharding.dealing import deal
from reshard.sharding.placement import Nested, PackedShard, Placement, Replicate, Shard
from reshard.strategies import PackedColwiseParallel, RowwiseParallel, as_dtensor, rows_of, take, torch_placement
from reshard.strategies.collectives import all_gather, all_reduce, chunk_bounds, largest_only, reduce_scatter, split

CASES = 150


def random_case(draw: random.Random, world_size: int) -> tuple[tuple[int, ...], Placement]:
    """Draw a shape and a placement. Half of the packed ones divide evenly, so that DTensor can express them."""
    shape = [draw.choice([0, 1, 2, 3, 5, 7, 8, 12]) for _ in range(draw.randint(1, 4))]
    dim = draw.randrange(len(shape))
    kind = draw.choice(["shard", "shard", "packed", "replicate"])
    if kind == "replicate":
        return tuple(shape), Replicate()
    if kind == "shard":
        return tuple(shape), Shard(dim)
    if draw.random() < 0.5:
        blocks = [draw.randint(1, 3) * world_size] * draw.randint(1, 4)
    else:
        blocks = [draw.randint(0, 5) for _ in range(draw.randint(1, 4))]
    shape[dim] = sum(blocks)
    return tuple(shape), PackedShard(dim, tuple(blocks))


def compare(tensor: torch.Tensor, placement: Placement, mesh: DeviceMesh) -> bool:
    """Whether DTensor can express the placement too. Assert that it cuts the same."""
    rank, world_size, shape = mesh.get_local_rank(), mesh.size(), tuple(tensor.shape)
    local = take(tensor, placement, shape, rank=rank, world_size=world_size)
    word = torch_placement(placement, world_size)
    if word is None:
        assert isinstance(placement, PackedShard)
        assert len(set(placement.blocks)) > 1 or placement.blocks[0] % world_size, (shape, placement)
        assert as_dtensor(local, placement, mesh, shape) is local
        return False
    expected = distribute_tensor(tensor, mesh, [word])
    assert torch.equal(local, expected.to_local()), (shape, placement, local, expected.to_local())
    ours = as_dtensor(local, placement, mesh, shape)
    assert isinstance(ours, DTensor)
    assert ours.placements == (word,)
    assert tuple(ours.shape) == shape
    if tensor.numel():  # strides of an empty tensor mean nothing, and torch counts a size of 0 as 1 there
        assert ours.stride() == tensor.stride(), (shape, placement)
    assert torch.equal(ours.full_tensor(), tensor), (shape, placement)
    return True


def compare_nested(mesh: DeviceMesh, generator: torch.Generator) -> None:
    """Compare rows of two ranks (outer placement over the rows, inner one inside) with DTensor on two axes."""
    rank, world_size, row = mesh.get_local_rank(), mesh.size(), 2
    rows = world_size // row
    shape = (2 * rows + 1, 2 * 3 * row, 5)
    tensor = torch.randn(shape, generator=generator)
    view = rows_of(mesh, row)
    assert rows_of(mesh, row) is view
    for inner in (Replicate(), Shard(1), Shard(2), PackedShard(1, (3 * row, 3 * row))):
        placement = Nested(Shard(0), inner, row)
        local = take(tensor, placement, shape, rank=rank, world_size=world_size)
        words = [torch_placement(Shard(0), rows), torch_placement(inner, row)]
        assert torch.equal(local, distribute_tensor(tensor, view, words).to_local()), placement
        ours = as_dtensor(local, placement, mesh, shape)
        assert isinstance(ours, DTensor)
        assert ours.placements == tuple(words)
        assert torch.equal(ours.full_tensor(), tensor), placement
    unsaid = Nested(Shard(0), PackedShard(1, (4 * row, 2 * row)), row)
    local = take(tensor, unsaid, shape, rank=rank, world_size=world_size)
    assert as_dtensor(local, unsaid, mesh, shape) is local


def compare_parameters(mesh: DeviceMesh) -> None:
    """Check that `partition_tensor` on a mesh gives DTensors of the full parameter, if DTensor can express them."""
    rank, world_size = mesh.get_local_rank(), mesh.size()
    for style, shape in ((RowwiseParallel(), (3, 7)), (PackedColwiseParallel(), (4 * world_size, 3))):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        parameter = style.partition_tensor(tensor, tensor, "weight", torch.bfloat16, True, rank, mesh)
        assert isinstance(parameter, torch.nn.Parameter)
        assert torch.equal(parameter.data.full_tensor(), tensor.bfloat16())
    tensor = torch.randn(7, 3)
    assert not isinstance(
        PackedColwiseParallel(blocks=[4, 2, 1]).partition_tensor(tensor, tensor, "weight", None, True, rank, mesh).data,
        DTensor,
    )


def compare_collectives(mesh: DeviceMesh) -> None:
    """Compare our collectives with sums and joins of known tensors. Small tensors take another path than large ones."""
    rank, world_size = mesh.get_local_rank(), mesh.size()
    for dtype, count in itertools.product((torch.float32, torch.bfloat16, torch.float16), (1, 77, 600_000)):
        brought = [
            torch.randn(3, count, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(world_size)
        ]
        x = brought[rank].clone()
        total = all_reduce(x, mesh)
        assert total is x
        assert total.dtype == dtype
        expected = torch.stack(brought).double().sum(0)
        bound = world_size * torch.finfo(dtype).eps * torch.stack(brought).double().abs().sum(0)
        assert ((total.double() - expected).abs() <= bound).all(), (dtype, count)
        everyone = [torch.empty_like(total) for _ in brought]
        dist.all_gather(everyone, total)
        assert all(torch.equal(one, total) for one in everyone), "ranks have different sums"
    for size in (1, world_size, 3 * world_size + 1, 130):  # ranks that hold less, or nothing; many ties
        whole = torch.randint(-4, 2, (2, 3, size), generator=torch.Generator().manual_seed(size)).bfloat16()
        bounds = chunk_bounds(size, world_size)
        for cut in (bounds, deal(size, world_size), [(0, size), *[(size, size)] * (world_size - 1)]):
            part = split(whole, -1, cut, mesh)
            assert torch.equal(all_gather(part, -1, cut, mesh), whole)
            largest = largest_only(part, cut, mesh)
            assert largest.shape == whole.shape
            assert torch.equal(largest.argmax(-1), whole.argmax(-1))
            assert largest.sum() == 6
        brought = [torch.randn(2, size, 3, generator=torch.Generator().manual_seed(r)) for r in range(world_size)]
        for dim, total in ((1, sum(brought)), (-2, sum(brought))):
            part = reduce_scatter(brought[rank], dim, mesh)
            expected = split(total, dim, bounds, mesh)
            assert part.shape == expected.shape
            torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-6)


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("tp",))
    draw = random.Random(2024)
    generator = torch.Generator().manual_seed(2024)
    said = dict.fromkeys((Replicate, Shard, PackedShard), 0)
    unsaid = 0
    for _ in range(CASES):
        shape, placement = random_case(draw, mesh.size())
        if compare(torch.randn(shape, generator=generator), placement, mesh):
            said[type(placement)] += 1
        else:
            unsaid += 1
    compare_parameters(mesh)
    compare_collectives(mesh)
    if mesh.size() % 2 == 0:
        compare_nested(mesh, generator)
    if mesh.get_local_rank() == 0:
        assert min(*said.values(), unsaid) > 5, (said, unsaid)
        print(f"compared {sum(said.values())} cases, {unsaid} without a word")
    dist.destroy_process_group()
    sys.stdout.flush()
    # In one run of ten, on two cores, gloo's threads abort a process that exits normally (torch 2.13). All comparisons
    # are done by now, and a failed assertion has exited before.
    os._exit(0)


main()

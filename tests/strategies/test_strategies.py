"""Styles: `partition_tensor`, the executor's regions, DTensor and torch.chunk cut alike, bit for bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cutting import DTYPES, bits, by_regions, chunk, mesh_of, oracle, random_bits, same
from hypothesis import given, settings
from hypothesis import strategies as st
from places import WORKERS
from safetensors import safe_open
from safetensors.torch import save_file
from torchrun_tools import on_ranks

from reshard.errors import BadInputError
from reshard.sharding.placement import PackedShard, Placement, Replicate, Shard, block_sizes
from reshard.strategies import (
    ALL_PARALLEL_STYLES,
    PackedColwiseParallel,
    PackedRowwiseParallel,
    ParallelInterface,
    TensorParallelLayer,
    get_packed_weights,
    get_tensor_shard,
    linear,
    take,
)
from reshard.strategies.built_in import BUILT_IN
from reshard.strategies.registry import _NAMES, _PACKED, heads_in, is_built_in

# The dim that each style cuts of a 1-d, a 2-d and a 3-d parameter; None: replicated.
DIMS: dict[str, tuple[int | None, int | None, int | None]] = {
    "colwise": (0, 0, 1),
    "colwise_gather_output": (0, 0, 1),
    "colwise_rep": (0, 0, 1),
    "rowwise": (None, 1, 2),
    "rowwise_split_input": (None, 1, 2),
    "rowwise_rep": (None, 1, 2),
    "packed_colwise": (0, 0, 1),
    "packed_rowwise": (None, 1, 2),
    "local_colwise": (0, 0, 1),
    "local_rowwise": (None, 1, 2),
    "local_packed_rowwise": (None, 1, 2),
    "local": (None, None, None),
    "conv1d_colwise": (0, 1, 2),
    "conv1d_colwise_gather_output": (0, 1, 2),
    "conv1d_rowwise": (None, 0, 0),
    "conv1d_rowwise_split_input": (None, 0, 0),
    "conv1d_packed_colwise": (0, 1, 2),
    "conv_colwise_gather_output": (0, 0, 0),
    "conv_transposed_colwise_gather_output": (0, 1, 1),
    "heads": (None, None, None),
    "embedding_rowwise": (0, 0, 0),
    "embedding_local_colwise": (None, 1, 1),
    "embedding_colwise": (None, 1, 1),
    "sequence_parallel": (None, None, None),
    "grouped_gemm": (0, 0, 0),
    "ep_dispatch_experts": (None, None, None),
    "ep_router": (None, None, None),
    "gather": (None, None, None),
    "moe_tp_experts": (None, None, None),
    "moe_identity_expert": (None, None, None),
    "mla_kv_a_proj": (None, None, None),
    "all_reduce": (None, None, None),
    "replicate": (None, None, None),
    "replicated_with_grad_allreduce": (None, None, None),
    "local_params": (None, None, None),
}


def joined(parts: list[torch.Tensor], placement: Placement, shape: tuple[int, ...]) -> torch.Tensor:
    """Join the parts by concatenation alone."""
    if isinstance(placement, Replicate):
        return parts[0]
    if isinstance(placement, Shard):
        return torch.cat(parts, placement.dim)
    dim, size = placement.dim, len(parts)
    lengths = [[chunk(torch.empty(block), 0, rank, size).numel() for block in placement.blocks] for rank in range(size)]
    split = [torch.split(part, lengths[rank], dim) for rank, part in enumerate(parts)]
    return torch.cat([torch.cat(column, dim) for column in zip(*split)], dim)


def test_every_built_in_style_is_tested() -> None:
    assert set(ALL_PARALLEL_STYLES) == set(DIMS) | {"interleaved_rowwise"}


@pytest.mark.parametrize(("pairs", "ranks"), [(6, 2), (5, 2), (7, 3), (2, 3)])
def test_gate_and_up_that_alternate_stay_together(pairs: int, ranks: int) -> None:
    """The bounds are twice those of what the pairs become, which torch.chunk cuts."""
    tensor = torch.arange(3 * 2 * pairs).view(3, 2 * pairs)
    halves = [chunk(torch.arange(pairs), 0, rank, ranks).tolist() for rank in range(ranks)]
    for rank, held in enumerate(halves):
        expected = tensor.view(3, pairs, 2)[:, held].reshape(3, -1)
        found = ALL_PARALLEL_STYLES["interleaved_rowwise"].partition_tensor(
            tensor, tensor.to("meta"), "gate_up_proj", None, True, rank, mesh_of(ranks)
        )
        assert torch.equal(found.data, expected)


def test_a_module_is_told_how_many_heads_it_has() -> None:
    """Of 8 query heads and 2 KV heads in features of 4 elements, the rank has 3 and 1."""

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = torch.nn.Linear(32, 32), torch.nn.Linear(32, 8)
            self.num_heads, self.embed_dim, self.num_key_value_heads, self.head_dim = 8, 32, 2, 4

    module = Attention()
    module.q_proj.__dict__["weight"], module.k_proj.__dict__["weight"] = torch.zeros(12, 32), torch.zeros(4, 32)
    style = ALL_PARALLEL_STYLES.find("heads[8,2,embed_dim,kv:num_key_value_heads,num_heads]")
    style.prepare_module_tp(module, mesh_of(2))
    assert (module.num_heads, module.embed_dim, module.num_key_value_heads, module.head_dim) == (3, 12, 1, 4)


@pytest.mark.parametrize("style", DIMS)
@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 6), st.sampled_from(DTYPES), st.data())
def test_all_cuts_agree(style: str, sizes: list[int], world_size: int, dtype: torch.dtype, data: st.DataObject) -> None:
    dim = DIMS[style][len(sizes) - 1]
    placement: Placement
    if dim is None:
        placement = Replicate()
    elif "packed" in style:
        sizes[dim] *= 2
        placement = PackedShard(dim, (sizes[dim] // 2,) * 2)
    else:
        placement = Shard(dim)
    shape = tuple(sizes)
    tensor = random_bits(shape, dtype, data.draw(st.integers(0, 99)))
    parts = []
    for rank in range(world_size):
        expected = oracle(bits(tensor), placement, rank, world_size).view(dtype)
        parameter = ALL_PARALLEL_STYLES[style].partition_tensor(
            tensor, torch.empty(shape, device="meta"), "weight", None, True, rank, mesh_of(world_size)
        )
        assert isinstance(parameter, torch.nn.Parameter)
        assert parameter.is_contiguous()
        assert parameter.requires_grad == dtype.is_floating_point
        assert same(parameter.data, expected)
        assert same(by_regions(tensor, placement, rank, world_size), expected)
        parts.append(bits(parameter.data))
    assert torch.equal(joined(parts, placement, shape), bits(tensor))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([PackedColwiseParallel, PackedRowwiseParallel]),
    st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from(DTYPES),
)
def test_packed_styles_with_any_blocks(
    kind: type, blocks: list[int], unit: int, world_size: int, dtype: torch.dtype
) -> None:
    size = sum(blocks) * unit
    dim, shape = (0, (size, 3)) if kind is PackedColwiseParallel else (1, (3, size))
    placement = PackedShard(dim, tuple(block * unit for block in blocks))
    tensor = random_bits(shape, dtype)
    for rank in range(world_size):
        found = kind(blocks=blocks).partition_tensor(tensor, tensor, "weight", None, True, rank, mesh_of(world_size))
        expected = oracle(bits(tensor), placement, rank, world_size).view(dtype)
        assert same(found.data, expected)
        assert same(by_regions(tensor, placement, rank, world_size), expected)


@pytest.mark.parametrize("style", DIMS)
def test_scalars_are_whole_on_every_rank(style: str) -> None:
    tensor = torch.tensor(1.5)
    found = ALL_PARALLEL_STYLES[style].partition_tensor(tensor, tensor, "scale", None, True, 1, mesh_of(3))
    assert found.shape == ()
    assert found == 1.5


def test_cast_and_contiguity_are_optional() -> None:
    tensor = torch.randn(6, 5)
    style = ALL_PARALLEL_STYLES["rowwise"]
    cast = style.partition_tensor(tensor, tensor, "weight", torch.bfloat16, True, 1, mesh_of(2))
    assert same(cast.data, tensor[:, 3:].bfloat16())
    view = style.partition_tensor(tensor, tensor, "weight", None, False, 1, mesh_of(2))
    assert view.data_ptr() == tensor[:, 3:].data_ptr()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=4), st.integers(1, 6), st.sampled_from(DTYPES), st.data())
def test_get_tensor_shard(sizes: list[int], world_size: int, dtype: torch.dtype, data: st.DataObject) -> None:
    tensor = random_bits(tuple(sizes), dtype)
    dim = data.draw(st.integers(-len(sizes), len(sizes) - 1))
    for rank in range(world_size):
        found = get_tensor_shard(tensor, tensor, mesh_of(world_size), rank, dim)
        assert same(found, chunk(bits(tensor), dim, rank, world_size).view(dtype))


@pytest.mark.parametrize("blocks", [1, 2, 3, [4, 1, 1], (1, 2)])
@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_get_packed_weights(blocks: Any, dim: int) -> None:
    tensor = torch.arange(18 * 12).reshape(18, 12)
    placement = PackedShard(dim % 2, block_sizes(tensor.shape[dim], blocks))
    for world_size in range(1, 7):
        for rank in range(world_size):
            found = get_packed_weights(tensor, tensor, mesh_of(world_size), rank, dim, blocks)
            assert torch.equal(found, oracle(tensor, placement, rank, world_size))


def test_get_packed_weights_drops_no_row() -> None:
    """gate|up of 5 rows each over 2 ranks: 3 + 2 rows of both. Block sizes divided by the ranks would lose one."""
    tensor = torch.arange(10)
    assert get_packed_weights(tensor, tensor, mesh_of(2), 0, 0).tolist() == [0, 1, 2, 5, 6, 7]
    assert get_packed_weights(tensor, tensor, mesh_of(2), 1, 0).tolist() == [3, 4, 8, 9]
    with pytest.raises(ValueError, match="cannot be packed"):
        get_packed_weights(tensor, tensor, mesh_of(2), 0, 0, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lazy_slices_are_cut_as_tensors_are(dtype: torch.dtype, tmp_path: Path) -> None:
    shapes = [(), (1,), (5,), (0, 3), (6, 4), (4, 0), (2, 6, 3)]
    tensors = {str(shape): random_bits(shape, dtype) for shape in shapes}
    save_file(tensors, tmp_path / "lazy.safetensors")
    with safe_open(tmp_path / "lazy.safetensors", framework="pt") as file:
        for name, tensor in tensors.items():
            lazy, shape = file.get_slice(name), tuple(tensor.shape)
            for rank in range(5):
                assert same(take(lazy, Replicate(), shape, rank=rank, world_size=5), tensor)
                for dim in range(-len(shape), len(shape)):
                    expected = chunk(bits(tensor), dim, rank, 5).view(dtype)
                    assert same(get_tensor_shard(lazy, tensor, mesh_of(5), rank, dim), expected)
                    if shape[dim] % 2 == 0:
                        packed = PackedShard(dim % len(shape), (shape[dim] // 2,) * 2)
                        expected = oracle(bits(tensor), packed, rank, 5).view(dtype)
                        assert same(get_packed_weights(lazy, tensor, mesh_of(5), rank, dim), expected)


@pytest.mark.parametrize("world_size", [3, 4])
def test_dtensor_cuts_alike(world_size: int) -> None:
    """On real ranks, `take` equals `distribute_tensor(...).to_local()`, and `as_dtensor` equals `full_tensor()`."""
    done = on_ranks(world_size, str(WORKERS / "distribute.py"), timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "compared" in done.stdout


def test_unknown_style_lists_the_known_ones() -> None:
    with pytest.raises(BadInputError, match="unknown tensor-parallel style 'colwize'") as caught:
        ALL_PARALLEL_STYLES.find("colwize")
    assert caught.value.hint is not None
    for style in DIMS:
        assert style in caught.value.hint


def test_a_registered_style_is_usable_where_it_was_registered() -> None:
    class Columns(TensorParallelLayer):
        def placement(self, param_type: str, shape: Any) -> Placement:
            return Shard(1)

    before = dict(ALL_PARALLEL_STYLES)
    mine = ParallelInterface()
    mine.register_strategy("columns", Columns())
    tensor = torch.arange(6).reshape(2, 3)
    found = mine.find("columns").partition_tensor(tensor, tensor, "weight", None, True, 1, mesh_of(2))
    assert found.tolist() == [[2], [5]]
    mine.register_strategy("colwise", Columns())
    assert isinstance(mine["colwise"], Columns)
    assert dict(ALL_PARALLEL_STYLES) == before
    assert "columns" not in ALL_PARALLEL_STYLES


def test_the_names_of_the_built_in_styles_are_known_without_torch() -> None:
    assert {name for name in BUILT_IN if is_built_in(name)} == BUILT_IN.keys() == _NAMES
    packed = {name for name, strategy in BUILT_IN.items() if hasattr(strategy, "blocks")}
    assert packed == {name for name in BUILT_IN if is_built_in(f"{name}[4,1]")} - {"heads"} == set(_PACKED)
    assert heads_in("heads[8,2,self.num_heads,kv:groups]") == (8, 2, ("self.num_heads", "kv:groups"))
    assert not any(map(heads_in, ("heads", "heads[8]", "heads[8,2,__import__('os')]", "colwise")))
    assert not any(map(is_built_in, ("mine", "mine[1,1]", "colwise[", "")))


def test_every_interface_sees_the_built_in_styles() -> None:
    mine = ParallelInterface()
    mine.register_strategy("mine", TensorParallelLayer())
    assert mine.find("colwise") is ALL_PARALLEL_STYLES["colwise"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_token_that_no_rank_has_is_refused_as_in_one_process(rank: int) -> None:
    """The token's row would be all zeros, and the text would go on."""
    mesh: Any = SimpleNamespace(size=lambda: 2, get_local_rank=lambda: rank)
    module = torch.nn.Embedding(3 - rank, 4)
    module.num_embeddings = 5
    style = ALL_PARALLEL_STYLES["embedding_rowwise"]

    def look_up(*ids: int) -> torch.Tensor:
        return module(*style._prepare_input_fn(None, None, module, (torch.tensor(ids),), mesh))

    assert look_up(0, 1, 2, 3, 4).shape == (5, 4)
    for wrong in (5, 999, -1):
        with pytest.raises(IndexError):
            look_up(0, wrong)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_rank_without_output_channels(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 channels, the last of 5 ranks has none, and torch computes no such convolution."""
    style = ALL_PARALLEL_STYLES.find(f"conv_{'transposed_' if transposed else ''}colwise_gather_output")
    module = (torch.nn.ConvTranspose1d if transposed else torch.nn.Conv1d)(3, 16, 2)
    mesh = SimpleNamespace(size=lambda: 5, get_local_rank=lambda: 4)
    dim = 1 if transposed else 0
    for own, parameter in module._parameters.items():
        along = dim if own == "weight" else 0
        module.__dict__[own] = parameter.detach().narrow(along, 16, 0)
    gathered: list[torch.Tensor] = []
    monkeypatch.setattr(linear, "all_gather", lambda x, at, *_: gathered.append(x) or x)
    style.prepare_module_tp(module, mesh)
    module(torch.randn(2, 3, 8))
    assert gathered[0].shape == (2, 0, 9 if transposed else 7)

"""A resharded folder of very many tensors: its manifest, and the header of its last rank file, which is else a hole."""

from __future__ import annotations

from pathlib import Path

from reshard.resharded.layout import file_layout, rank_file_name
from reshard.resharded.manifest import Manifest
from reshard.resharded.rank_file import FileRecord
from reshard.resharded.targets import Target, rank_tensors
from reshard.sharding.placement import Shard
from reshard.sharding.regions import whole
from reshard.sharding.topology import Topology

__all__ = ["write_many"]

_PER_LAYER = 1000


def write_many(folder: Path, *, ranks: int, tensors: int) -> int:
    """Write the folder, with `tensors` matrices of which each rank has a row. Returns the bytes of the manifest."""
    folder.mkdir()
    names = [
        f"model.layers.{number // _PER_LAYER}.mlp.experts.{number % _PER_LAYER}.down_proj.weight"
        for number in range(tensors)
    ]
    parameters = tuple(
        Target(name, (ranks, 8), "bfloat16", Shard(0), whole(name, (ranks, 8)), "rowwise") for name in names
    )
    layout = file_layout(
        rank_file_name(ranks - 1), rank_tensors(parameters, rank=ranks - 1, world_size=ranks), boxes=frozenset(names)
    )
    with open(folder / layout.name, "wb") as file:
        file.write(layout.head)
        file.truncate(layout.size)
    digests = [f"{number * 0x9E3779B97F4A7C15 % 2**127:032x}" for number in range(tensors)]
    records = tuple(
        FileRecord(rank_file_name(rank), layout.size, digests[rank], dict(zip(names, digests))) for rank in range(ranks)
    )
    made = Manifest(
        tool={},
        architecture="Many",
        model_type="many",
        dtype="bfloat16",
        topology=Topology(ranks),
        repo_id=None,
        commit=None,
        source_files=(),
        parameters=parameters,
        hooks={},
        custom={},
        tied={},
        duplicates={},
        dropped=(),
        runtime_only=(),
        rank_files=records,
        unused_file=None,
        extras=(),
    )
    return (folder / "reshard.json").write_bytes(made.to_bytes())

"""Pictures of parameters, groups of layers and bars, beside rank files whose elements say where they are from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from cli_tools import Checkpoint
from safetensors.numpy import load_file, save_file

import reshard
from reshard.resharded.report import kind_of
from reshard.showing.bars import bars_text
from reshard.showing.loads import KINDS, rank_loads
from reshard.showing.page.cells import Picture, picture_of
from reshard.showing.page.groups import groups_of
from reshard.text import numbers_in_runs


def numbered(folder: Path) -> None:
    """Give every element of a checkpoint a number of its own. fp32 holds all of them exactly."""
    first = 0
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            tensors[name] = numpy.arange(first, first + tensor.size, dtype=numpy.float32).reshape(tensor.shape)
            first += tensor.size
        save_file(tensors, path, metadata={"format": "pt"})
    assert first < 1 << 24


def global_tensors(folder: Path) -> dict[str, Any]:
    """Return the parameters as the model has them: experts fused, gate above up."""
    found: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    experts = sorted({int(name.split(".experts.")[1].split(".")[0]) for name in found if ".experts." in name})
    if experts:
        at = "model.layers.0.mlp.experts."
        gate, up, down = (
            numpy.stack([found[f"{at}{number}.{part}_proj.weight"] for number in experts])
            for part in ("gate", "up", "down")
        )
        found |= {f"{at}gate_up_proj": numpy.concatenate([gate, up], 1), f"{at}down_proj": down}
    return found


def cell_ranks(picture: Picture, shape: list[int], place: tuple[int, ...]) -> tuple[int, ...]:
    """Return the ranks of the cell that is drawn where an element is."""
    at = [
        (place[dim] + 0.5) * side / shape[dim] if dim is not None else side / 2
        for dim, side in zip(picture.dims, (picture.height, picture.width))
    ]
    [ranks] = [
        cell.ranks
        for cell in picture.cells
        if cell.y <= at[0] < cell.y + cell.height + 0.01 and cell.x <= at[1] < cell.x + cell.width + 0.01
    ]
    return ranks


CASES = {
    "heads that do not divide": ("llama", {"tp_size": 3}),
    "shared KV heads": ("llama", {"tp_size": 8}),
    "packed experts": ("qwen3_moe", {"tp_size": 4}),
    "experts on two axes": ("qwen3_moe", {"tp_size": 4, "ep_size": 2}),
    "whole experts": ("qwen3_moe", {"tp_size": 2, "ep_size": 2}),
    "one rank": ("llama", {"tp_size": 1}),
}


@pytest.mark.parametrize(("family", "sizes"), CASES.values(), ids=CASES)
def test_cells_hold_what_the_files_hold(
    family: str, sizes: dict[str, int], tmp_path: Path, copied: Callable[[str], Path]
) -> None:
    """Each element of each parameter is drawn in a cell of just the ranks whose files have it."""
    source, out = copied(family), tmp_path / "out"
    numbered(source)
    report = reshard.convert(source, out, sync=False, **sizes).to_dict()
    held: dict[str, list[set[float]]] = {}
    for record in report["ranks"]:
        for name, tensor in load_file(out / record["file"]).items():
            held.setdefault(name, []).append(set(tensor.ravel().tolist()))
    planned = reshard.plan(source, **sizes).to_dict()["parameters"]
    assert report["parameters"] == [{key: row[key] for key in row if key != "heads"} for row in planned]
    tensors, looked_at = global_tensors(source), 0
    for row in report["parameters"]:
        names = [
            row["parameter"].replace("*", str(layer)) for first, _ in row["layers"] or [[0, 0]] for layer in [first]
        ]
        picture = picture_of(row)
        for name in names:
            tensor = tensors[name]
            assert list(tensor.shape) == row["shape"]
            assert picture.drawn
            for place in numpy.ndindex(tensor.shape):
                if sum(place) % 3 and tensor.size > 500:
                    continue  # a third is enough
                ranks = tuple(rank for rank, elements in enumerate(held[name]) if float(tensor[place]) in elements)
                assert cell_ranks(picture, row["shape"], place) == ranks, (name, place)
                looked_at += 1
    assert looked_at > 1000


@pytest.fixture
def copied(checkpoint: Checkpoint, tmp_path: Path) -> Callable[[str], Path]:
    """`copied(family)`: a pico checkpoint, to be changed."""
    return lambda family: Path(shutil.copytree(checkpoint(family), tmp_path / "source"))


@pytest.mark.parametrize(("family", "sizes"), list(CASES.values())[:4], ids=list(CASES)[:4])
def test_bytes_of_the_rows_are_those_of_the_files(
    family: str, sizes: dict[str, int], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    plan = reshard.plan(checkpoint(family), **sizes).to_dict()
    made = reshard.convert(checkpoint(family), tmp_path / "out", sync=False, **sizes)
    for report in (plan, made.to_dict()):
        for load, record in zip(rank_loads(report), made.rank_files):
            stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / record.name).values())
            assert load.weights == sum(row["rank_bytes"][load.rank] for row in report["parameters"]) == stored
            assert load.file == record.size


def test_layers_that_look_alike_are_one_group(checkpoint: Checkpoint) -> None:
    """The pico MoE has experts in layer 0 and a plain MLP in layer 1."""
    report = reshard.plan(checkpoint("qwen3_moe"), tp_size=2).to_dict()
    groups = groups_of(report)
    assert [(group.title, group.layers) for group in groups] == [
        ("before the layers", 1),
        ("model.layers.0", 1),
        ("model.layers.1", 1),
        ("after the layers", 1),
    ]
    drawn = [figure.row for group in groups for _, _, figures in group.blocks for figure in figures]
    assert set(drawn) == set(range(len(report["parameters"])))
    assert [kind for kind, _, _ in groups[1].blocks] == ["attention", "MLP", "experts", "other"]
    assert [whole for _, whole, _ in groups[1].blocks] == [False, True, False, True]  # only the router is an MLP there
    _, layers, _ = groups_of(reshard.plan(checkpoint("llama"), tp_size=2).to_dict())
    assert (layers.title, layers.layers) == ("model.layers.0, 1", 2)


def row(name: str, cuts: list[dict[str, Any]], ranks: int, shape: tuple[int, ...] = (64, 64)) -> dict[str, Any]:
    return {
        **{"parameter": name, "count": 1, "layers": [], "kind": "mlp", "shape": list(shape), "dtype": "bfloat16"},
        **{"bytes": 8192, "rank_bytes": [8192 // ranks] * ranks, "cuts": cuts, "style": None, "reason": None},
    }


def test_what_cannot_be_seen_is_not_drawn() -> None:
    cut = [{"dim": dim, "ranges": [[[rank, rank + 1]] for rank in range(64)]} for dim in (0, 1)]
    assert picture_of(row("fine", cut, 64)).drawn
    cut = [{"dim": dim, "ranges": [[[rank, rank + 1]] for rank in range(65)]} for dim in (0, 1)]
    assert not picture_of(row("many", cut, 65, (65, 65))).drawn
    boxes = [[[[rank, rank + 1]] * 3] for rank in range(2)]
    assert not picture_of({**row("three dims", [], 2, (2, 2, 2)), "boxes": boxes}).drawn
    cut = [{"dim": 1, "ranges": [[[at, at + 1]] for at in range(64)]}]
    rows = [{**row(f"layers.*.part{number}", cut, 64), "layers": [[number, number]]} for number in range(200)]
    groups = groups_of({"parameters": rows})
    assert [bool(group.blocks) for group in groups] == [True] * 187 + [False] * 13  # 12,000 cells


def test_ranks_without_a_part_are_in_no_cell() -> None:
    held = [[[0, 32]], [[32, 64]], []]
    picture = picture_of(row("uneven", [{"dim": 0, "ranges": held}], 3))
    assert [cell.ranks for cell in picture.cells] == [(0,), (1,)]
    assert not picture.whole
    hole = picture_of(row("hole", [{"dim": 0, "ranges": [[[0, 16]], [[48, 64]]]}], 2))
    assert [cell.ranks for cell in hole.cells] == [(0,), (), (1,)]
    assert picture_of(row("scalar", [], 2, ())).whole
    assert picture_of(row("empty", [], 2, (0, 4))).cells == ()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.*.self_attn.q_proj.weight", "attention"),
        ("encoder.layer.*.attention.self.query.weight", "attention"),
        ("model.layers.*.linear_attn.in_proj_qkvz.weight", "attention"),
        ("model.layers.*.post_attention_layernorm.weight", "other"),
        ("model.layers.*.mlp.experts.gate_up_proj", "experts"),
        ("model.layers.*.feed_forward.experts.down_proj", "experts"),
        ("model.layers.*.block_sparse_moe.experts.*.w1.weight", "experts"),
        ("model.layers.*.mlp.shared_experts.up_proj.weight", "mlp"),
        ("model.layers.*.feed_forward.w2.weight", "mlp"),
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("model.attentive.weight", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name, None) == kind
    assert kind in KINDS
    assert kind_of("model.shared.weight", "embedding_rowwise") == "embedding"


def test_bars(checkpoint: Checkpoint) -> None:
    report = reshard.plan(checkpoint("llama"), tp_size=3).to_dict()
    *bars, legend = bars_text(report)
    assert [line.split("  ")[0].strip() for line in bars] == ["rank 0", "rank 1", "rank 2"]
    loads = rank_loads(report)
    for line, load in zip(bars, loads):
        drawn = sum(line.count(sign) for sign in "█▓▒░·╱")
        assert drawn == round(60 * load.weights / max(other.weights for other in loads))
        assert f"+ {load.cache / 1000:.1f} kB of KV cache" in line
    assert legend.startswith("█ attention ")
    assert "╱ replicated 640 B" in legend
    [ranks, *_] = bars_text(reshard.plan(checkpoint("llama"), tp_size=2).to_dict())
    assert ranks.startswith("ranks 0, 1  ")
    assert bars_text(reshard.plan(checkpoint("llama"), tp_size=1).to_dict()) == []


@pytest.mark.parametrize("width", [30, 40, 60, 80, 200])
def test_bars_fit_the_terminal(width: int, checkpoint: Checkpoint) -> None:
    report = reshard.plan(checkpoint("llama"), tp_size=3).to_dict()
    plain = bars_text(report, width, blocks=False)
    assert all(len(line) <= width for line in plain)
    assert "".join(plain).isascii()
    assert all(len(line) <= width for line in bars_text(report, width))
    figures = [figure for line in bars_text(report) for figure in re.findall(r"[\d.]+ [kMG]?B", line)]
    assert all(figure in "\n".join(plain) for figure in figures)  # one that is cut is another


def test_many_different_ranks_are_not_all_listed() -> None:
    rows = [{**row("w", [{"dim": 0, "ranges": [[]] * 40}], 40), "rank_bytes": list(range(1, 41))}]
    report = {"parameters": rows, "rank_bytes": list(range(1, 41)), "ranks": [{}] * 40}
    lines = bars_text(report)
    assert len(lines) == 18
    assert lines[16] == "… and 24 more ranks"
    assert numbers_in_runs(range(16)) == "0–15"

"""A resharded folder is cut again without its model where that is certain: the bytes are those of a plan with it."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from cli_tools import tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merge_tools import add
from places import ROOT

import reshard
import reshard.operations.convert.work
from reshard.execution.origin import open_origin
from reshard.planning.recut import recut
from reshard.sharding.topology import Topology
from reshard.strategies import ParallelInterface, RowwiseParallel

# Name → family, options. The heads are 8 and 4 unless they are given.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {"num_key_value_heads": 8}),
    "GQA": ("llama", {}),
    "MQA": ("qwen3", {"num_key_value_heads": 1}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "packed": ("phi3", {}),
    "fused": ("gpt_neox", {}),
    "biased": ("qwen2", {}),
    "uneven": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 24}),
    "narrow": ("llama", {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 24}),
    "experts": ("qwen3_moe", {}),
    "shared expert": ("glm4_moe", {}),
    "half": ("llama", {"dtype": torch.bfloat16}),
}
RANKS = (1, 2, 3, 4, 6, 8)
# Pairs of ranks that need no model, and what decides: cuts of the ranks before, or config.json.
QUICK = {
    "dense": {(2, 4), (4, 2), (1, 8), (8, 4), (3, 2), (4, 1)},
    "GQA": {(2, 4), (4, 2), (1, 4), (8, 4), (8, 2), (3, 1)},
    "MQA": {(2, 4), (8, 4), (4, 2), (4, 8)},
    "tied": {(2, 4), (4, 2)},
    "packed": {(2, 4), (2, 3), (3, 8)},
    "fused": {(4, 2), (2, 1)},
    "biased": {(2, 4), (4, 2)},
    "uneven": {(6, 3), (1, 3), (3, 1)},
    "experts": {(2, 4), (4, 2)},
    "shared expert": {(2, 4), (4, 2)},
    "half": {(2, 4), (4, 2)},
}
SLOW = {"GQA": {(4, 8), (2, 3), (4, 6)}, "fused": {(2, 4)}, "uneven": {(3, 6), (1, 2)}, "narrow": {(6, 3), (1, 6)}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Return the folder of a case for a number of ranks, made when it is first asked for."""
    root = tmp_path_factory.mktemp("folders")

    def made(case: str, ranks: int) -> Path:
        family, options = CASES[case]
        source, out = root / case, root / f"{case} {ranks}"
        if not source.exists():
            pico.save(family, source, **options)
            add(source, {"unknown.weight": torch.randn(3, 5), "unknown.scale": torch.tensor(2.0, dtype=torch.float64)})
        if not out.exists():
            reshard.convert(source, out, tp_size=ranks, sync=False)
        return out

    return made


def with_the_model(source: Path, out: Path, **options: Any) -> None:
    """Convert by a plan that is made with the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reshard.operations.convert.work, "recut", lambda *_: None)
        reshard.convert(source, out, sync=False, **options)


def is_quick(folder: Path, ranks: int) -> bool:
    made = open_origin(str(folder)).made
    assert made is not None
    return recut(made, Topology(ranks)) is not None


@pytest.mark.parametrize("case", CASES)
def test_it_is_certain_where_it_matters(case: str, folder: Callable[[str, int], Path]) -> None:
    for quick, pairs in ((True, QUICK.get(case, ())), (False, SLOW.get(case, ()))):
        for first, second in pairs:
            assert is_quick(folder(case, first), second) is quick, (first, second)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(list(CASES)), st.sampled_from(list(itertools.permutations(RANKS, 2))))
def test_both_ways_give_the_same_bytes(
    folder: Callable[[str, int], Path],
    tmp_path_factory: pytest.TempPathFactory,
    case: str,
    ranks: tuple[int, int],
) -> None:
    heads = CASES[case][1].get("num_attention_heads", 8)
    first, second = (min(size, heads) for size in ranks)
    root, source = tmp_path_factory.mktemp("both"), folder(case, first)
    reshard.convert(source, root / "found", tp_size=second, sync=False)
    with_the_model(source, root / "expected", tp_size=second)
    assert tree(root / "found") == tree(root / "expected")
    assert tree(root / "found") == tree(folder(case, second))


def test_what_it_was_told_changes(folder: Callable[[str, int], Path], tmp_path: Path) -> None:
    """A cast, a plan and dropped tensors are decided with the model."""
    source = folder("GQA", 2)
    reshard.convert(source, tmp_path / "cast", tp_size=2, dtype="bfloat16")
    reshard.convert(source, tmp_path / "dropped", tp_size=2, drop_unused=True)
    reshard.convert(source, tmp_path / "experts", tp_size=2, ep_size=1)
    assert not is_quick(tmp_path / "cast", 4)
    assert not is_quick(tmp_path / "dropped", 4)
    assert is_quick(tmp_path / "experts", 4)
    made = open_origin(str(source)).made
    assert made is not None
    assert recut(made, Topology(4, 2)) is None


@pytest.mark.parametrize("heads", [{"num_attention_heads": None}, {"num_key_value_heads": None}, {"n_heads": 2}])
def test_numbers_that_do_not_tell(heads: dict[str, Any], folder: Callable[[str, int], Path]) -> None:
    """The defaults of a class are known to transformers only, and another number may be that of another attention."""
    made = open_origin(str(folder("GQA", 2))).made
    assert made is not None
    config = {key: value for key, value in {**made.source.config, **heads}.items() if value is not None}
    changed = replace(made, source=replace(made.source, config=config))
    assert recut(made, Topology(4)) is not None
    assert recut(changed, Topology(4)) is None
    assert recut(changed, Topology(1)) is not None


def test_the_plan_travels_with_the_folder(tmp_path: Path) -> None:
    """Rules of the user's own hold for other ranks too, whichever way they are planned."""
    source = pico.save("llama", tmp_path / "source")
    rules = {"extends": "auto", "model.embed_tokens": "replicate", "model.layers.*.mlp.up_proj": "colwise_rep"}
    reshard.convert(source, tmp_path / "two", tp_size=2, tp_plan=rules)
    reshard.convert(source, tmp_path / "four", tp_size=4, tp_plan=rules)
    assert is_quick(tmp_path / "two", 4)
    reshard.convert(tmp_path / "two", tmp_path / "again", tp_size=4)
    with_the_model(tmp_path / "two", tmp_path / "planned", tp_size=4)
    assert tree(tmp_path / "again") == tree(tmp_path / "four") == tree(tmp_path / "planned")
    three = reshard.convert(tmp_path / "two", tmp_path / "three", tp_size=3)  # needs the model
    assert {target.name: target.style for target in three.parameters} == {
        target.name: target.style for target in reshard.inspect(tmp_path / "two").parameters
    }


def test_a_style_of_ones_own_is_asked_for(tmp_path: Path) -> None:
    source, styles = pico.save("llama", tmp_path / "source"), tmp_path / "styles.py"
    styles.write_text(
        "from reshard.strategies import ParallelInterface, RowwiseParallel\nclass Own(RowwiseParallel):\n    pass\n"
    )

    own = ParallelInterface()
    own.register_strategy("own", RowwiseParallel())
    rules = {"extends": "auto", "model.layers.*.mlp.down_proj": "own"}
    reshard.convert(source, tmp_path / "two", tp_size=2, tp_plan=rules, strategies=own)
    assert not is_quick(tmp_path / "two", 4)
    with pytest.raises(reshard.BadInputError, match="unknown tensor-parallel style 'own'"):
        reshard.convert(tmp_path / "two", tmp_path / "four", tp_size=4)
    reshard.convert(source, tmp_path / "expected", tp_size=4, tp_plan=rules, strategies=own)
    reshard.convert(tmp_path / "two", tmp_path / "four", tp_size=4, strategies=own)
    assert tree(tmp_path / "four") == tree(tmp_path / "expected")


@pytest.mark.parametrize("case", ["GQA", "tied", "biased", "experts"])
def test_neither_torch_nor_transformers_is_imported(
    case: str, folder: Callable[[str, int], Path], tmp_path: Path
) -> None:
    code = f"""
import sys
from reshard.cli.main import main
try:
    main(["convert", {str(folder(case, 2))!r}, {str(tmp_path / "out")!r}, "--tp-size", "4"])
except SystemExit as ended:
    assert not ended.code, ended.code
print("heavy:", sorted({{"torch", "transformers", "numpy"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"
    assert tree(tmp_path / "out") == tree(folder(case, 4))

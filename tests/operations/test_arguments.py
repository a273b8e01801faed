"""The Python interface: every argument is checked by its name, before anything else happens."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import pytest
import torch
from cli_tools import Cli
from places import ROOT

import reshard
import runtime
from reshard.errors import ReshardError, UsageError
from reshard.operations.arguments import CHECKS, checked
from reshard.strategies import ALL_PARALLEL_STYLES
from reshard.text import printable

PUBLISHED = ("plan", "convert", "convert_part", "finish", "export", "inspect", "verify", "merge", "publish", "pull")
PUBLIC: dict[str, Callable[..., Any]] = {
    **{name: getattr(reshard, name) for name in PUBLISHED},
    "load": runtime.load,
}
# The rest of each call, apart from the argument in question.
GIVEN: dict[str, dict[str, Any]] = {
    "plan": {"source": "/nowhere/at/all", "tp_size": 2},
    "convert": {"source": "/nowhere/at/all", "out": "/nowhere/out", "tp_size": 2},
    "convert_part": {"source": "/nowhere/at/all", "out": "/nowhere/out", "tp_size": 2, "part": "1/2"},
    "finish": {"out": "/nowhere/out"},
    "export": {"source": "/nowhere/at/all", "out": "/nowhere/out", "tp_size": 2, "engine_python": sys.executable},
    "inspect": {"place": "/nowhere/at/all"},
    "verify": {"out": "/nowhere/at/all"},
    "merge": {"out": "/nowhere/at/all", "dest": "/nowhere/dest"},
    "publish": {"out": "/nowhere/at/all", "place": "org/name"},
    "pull": {"place": "org/name"},
    "load": {"place": "/nowhere/at/all"},
}
WRONG: dict[str, list[Any]] = {
    **{name: [None, "", 3, b"folder", ["a"], math] for name in ("source", "place")},
    **{name: [None, "", 3, b"folder", ["a"], "a\0b"] for name in ("out", "dest")},
    "to": ["", 3, b"folder", "a\0b"],
    **{name: ["", 3, b"folder"] for name in ("against", "like")},
    **{name: ["", 3, True, ["main"]] for name in ("revision", "layout", "licence", "weights", "part")},
    **{name: ["", 3, True, ["vllm"]] for name in ("engine", "platform", "moe_backend")},
    **{name: ["", 3, b"file", ["a"], "a\0b"] for name in ("engine_python", "plan")},
    "capability": ["9.0", 9.0, (9,), (9, 0, 0), (9, -1), (9.0, 0), (True, 0)],
    **{name: [0, -1, 2.0, "2", True, [2]] for name in ("tp_size", "ep_size", "dp_size", "workers", "pipeline_size")},
    **{name: [None, 1, "yes"] for name in ("drop_unused", "ep", "overwrite", "keep_cache", "reference_logits", "sync")},
    **{name: [None, 0, "no"] for name in ("private", "create_pr", "dry_run", "check_digests", "sequence_parallel")},
    **{name: [None, True, "bar"] for name in ("progress", "say")},
    "quantize": ["", "q4", 4, True, ["nf4"]],
    "quantize_config": [3, "", b"file", ["a"], {1: 2}, "a\0b"],
    **{name: [None, 1, "yes"] for name in ("quantize_experts", "dequantize")},
    "gpu_memory": [0, -5, 2.5, math.nan, math.inf, "80GB", True],
    **{name: [0, -1, 2.0, "2", True] for name in ("max_model_len", "batch_size")},
    "utilization": [0, -0.5, 1.5, math.nan, math.inf, "0.9", True, None],
    "kv_dtype": ["int4", "float64", torch.int8, 8, ""],
    "timeout": [0, -1, math.nan, math.inf, "60", None, True],
    "dtype": ["int4", "float64", torch.int8, torch.float8_e4m3fn, 16, "", float],
    "tp_plan": [None, 3, "", {1: "colwise"}, {"lm_head": None}, ["lm_head"]],
    "strategies": [None, 3, "", {"a": 1}, object()],
    "attn_implementation": ["", 3, True, ["sdpa"]],
    "links_into": [3, "folder", Path("folder"), [3], [""]],
    "include": [3, "*.txt", [3], [""]],
    "ranks": [3, "0-3", [0.5], ["a"], [True]],
    "device": ["", 3, b"cpu"],
    "compute": [None, "", "gpu", 4, True],
    "mesh": ["tp", 2, (2, 2)],
}


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_every_argument_has_a_check() -> None:
    for name, function in PUBLIC.items():
        assert set(parameters(function)) <= CHECKS.keys(), name
        assert hasattr(function, "__wrapped__"), name
    assert WRONG.keys() == CHECKS.keys()


CASES = [
    (name, argument, value)
    for name, function in PUBLIC.items()
    for argument in parameters(function)
    for value in WRONG[argument]
    if not (value is None and inspect.signature(function).parameters[argument].default is None)
]


@pytest.mark.parametrize(("name", "argument", "value"), CASES)
def test_what_makes_no_sense(name: str, argument: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        PUBLIC[name](**{**GIVEN[name], argument: value})
    assert caught.value.message.startswith(f"{name}: {argument} is ")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("give ")
    assert str(caught.value) == f"{caught.value.message}\nHint: {caught.value.hint}"


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(TypeError, match="plan: got an unexpected keyword argument 'tp'"):
        reshard.plan("somewhere", tp=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="convert: missing a required argument: 'out'"):
        reshard.convert("somewhere", tp_size=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "bf16", "torch.bfloat16"])
def test_a_dtype_as_people_write_it(dtype: Any, source: Path) -> None:
    assert reshard.plan(source, tp_size=2, dtype=dtype).model.dtype == "bfloat16"


def test_a_dtype_that_cannot_be_is_shown() -> None:
    with pytest.raises(UsageError, match=r"^plan: dtype is torch\.int8\n"):
        reshard.plan("somewhere", tp_size=2, dtype=torch.int8)


def test_memory_that_was_meant_in_another_unit(source: Path) -> None:
    with pytest.raises(reshard.TopologyError) as caught:
        reshard.plan(source, gpu_memory=24)
    assert caught.value.hint == "24 GB are 24e9 bytes, or --gpu-memory 24GB"


def test_a_dtype_of_the_command_line(source: Path, cli: Cli) -> None:
    report = cli("plan", source, "--tp-size", 2, "--dtype", "fp16", "--format", "json")
    assert json.loads(report.out)["dtype"] == "float16"


def test_numbers_of_other_kinds(source: Path) -> None:
    import numpy as np

    assert reshard.plan(source, tp_size=np.int64(2)).world_size == 2
    assert reshard.plan(source, gpu_memory=24e9).world_size == 1


@pytest.fixture
def strategies(tmp_path: Path) -> Path:
    path = tmp_path / "strategies.py"
    path.write_text(
        textwrap.dedent(
            """
            from reshard.strategies import ALL_PARALLEL_STYLES
            from reshard.strategies.linear import ColwiseParallel

            class Mine(ColwiseParallel):
                pass

            ALL_PARALLEL_STYLES.register_strategy("of_my_own", Mine())
            """
        )
    )
    return path


@pytest.mark.parametrize("kind", [str, Path])
def test_strategies_by_their_file(
    kind: Callable[[Path], Any], strategies: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ALL_PARALLEL_STYLES, "_registered", dict(ALL_PARALLEL_STYLES._registered))
    rules = {"extends": "auto", "layers.*.mlp.up_proj": "of_my_own"}
    plan = reshard.plan(source, tp_size=2, tp_plan=rules, strategies=kind(strategies))
    assert plan.custom == {"of_my_own": "Mine"}


def test_a_file_of_strategies_that_there_is_not(source: Path, folder: Path) -> None:
    with pytest.raises(reshard.BadInputError, match=r"nowhere\.py: cannot be read"):
        reshard.plan(source, tp_size=2, strategies="/nowhere.py")
    with pytest.raises(reshard.BadInputError, match=r"nowhere\.py: cannot be read"):
        runtime.load(folder, strategies="/nowhere.py")


def test_checks_keep_what_a_function_says_of_itself() -> None:
    @checked
    def work(out: str, *, workers: int | None = None) -> tuple[str, int | None]:
        """Words."""
        return out, workers

    assert (work.__name__, work.__doc__, parameters(work)) == ("work", "Words.", ["out", "workers"])
    assert work(PurePath("a"), workers=None) == (Path("a"), None)  # type: ignore[arg-type]


def test_what_can_be_imported() -> None:
    for name in reshard.__all__:
        assert getattr(reshard, name) is not None
        assert name in dir(reshard)
    raised = {kind for kind in vars(importlib.import_module("reshard.errors")).values() if inspect.isclass(kind)}
    errors = {kind for kind in raised if issubclass(kind, ReshardError)}
    assert errors <= {getattr(reshard, name) for name in reshard.__all__}
    assert reshard.Manifest.__module__ == "reshard.resharded.manifest"
    assert reshard.ReshardPlan.__module__ == "reshard.planning.plan"
    heavy = {"torch", "numpy", "click", "reshard.resharded.manifest"}
    code = f"import sys, reshard; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_an_error_survives_another_process() -> None:
    error = pickle.loads(pickle.dumps(reshard.StorageError("disk: full", hint="make room")))
    assert (type(error), str(error), error.exit_code) == (reshard.StorageError, "disk: full\nHint: make room", 5)
    assert str(reshard.StorageError("disk: full")) == "disk: full"
    assert printable(error) == "disk: full"  # as part of another error


def test_plans_and_manifests_are_short_to_look_at(source: Path, folder: Path, cli: Cli) -> None:
    plan, manifest = reshard.plan(source, tp_size=2), reshard.inspect(folder)
    assert repr(plan) == "<ReshardPlan of LlamaForCausalLM (float32) for 2 ranks: 21 parameters>"
    assert repr(manifest).startswith("<Manifest of LlamaForCausalLM (float32) for 2 ranks: 21 parameters, ")
    assert json.loads(cli("plan", source, "--tp-size", 2, "--format", "json").out) == plan.to_dict()
    assert json.loads(cli("inspect", folder, "--format", "json").out) == manifest.to_dict()


@pytest.mark.parametrize("package", ["reshard", "runtime"])
def test_types_are_for_others_too(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()

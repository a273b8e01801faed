"""The trace, against torch: programs of copies run on real tensors, and are traced on tensors without elements."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.engines.copy_plan import RankPlan, _rank
from reshard.engines.resolve import _Findings, _Rank
from reshard.engines.vllm_planner.copy_trace import Trace, described, mode_of, numbers_of_host
from reshard.errors import BadInputError
from reshard.files.dtypes import CODES
from reshard.files.header import TensorInfo

SOURCES = {"a": (6, 4), "b": (4, 6), "c": (24,), "d": (2, 3, 4)}
VALUES = {
    name: 100.0 * number + torch.arange(24.0).reshape(shape) for number, (name, shape) in enumerate(SOURCES.items())
}
Step = Callable[[dict[str, torch.Tensor]], object]


def traced(program: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> RankPlan:
    """Trace a program that makes parameters of sources, as the planner does."""
    trace = Trace()
    with mode_of(trace), torch.device("meta"), numbers_of_host(trace):
        sources = {}
        for name, shape in SOURCES.items():
            sources[name] = torch.empty(shape)
            trace.name(sources[name], f"s:{name}")
        made = program(sources)
    held = {name: [trace.name(tensor), *described(tensor)] for name, tensor in made.items()}
    writes = trace.leading_to({str(of[0]) for of in held.values()})
    return _rank(json.loads(json.dumps({"tp": 0, "pp": 0, "backends": [], "tensors": held, "writes": writes})))


def filled(plan: RankPlan) -> dict[str, torch.Tensor]:
    """Make the parameters as the executor would: from regions alone."""
    infos = {name: TensorInfo(name, CODES["float32"], shape, "", 0, 0) for name, shape in SOURCES.items()}
    findings, made = _Findings(infos), {}
    for name, target in _Rank(plan, findings).tensors().items():
        made[name] = torch.full(target.shape, float("nan"))
        for region in target.regions:
            constant = findings.constants.get(region.source)
            source = VALUES[region.source].reshape(-1) if constant is None else torch.tensor([float(constant[1])])
            box = tuple(slice(at, at + size) for at, size in zip(region.target_start, region.extent))
            made[name][box] = source.as_strided(region.extent, region.strides, region.offset)
    return made


@st.composite
def steps(draw: Any) -> Step:
    """One copy between views of equal shapes: slices, single rows, transposes, flat runs, through clones or joined."""
    source = draw(st.sampled_from(sorted(SOURCES)))
    kind = draw(
        st.sampled_from(("rows", "columns", "flat", "turned", "row", "fill", "zero", "clone", "cat", "stack", "cast"))
    )
    at, size, to = draw(st.integers(0, 5)), draw(st.integers(1, 6)), draw(st.integers(0, 5))
    value = draw(st.sampled_from((0.0, 1.0, -2.5)))

    def step(held: dict[str, torch.Tensor]) -> None:
        parameter, given = held["parameter"], held[source]
        table = given.reshape(6, 4)
        rows = min(size, 6 - at, 6 - to)
        if kind == "rows":
            parameter.narrow(0, to, rows).copy_(table.narrow(0, at, rows))
        elif kind == "columns":
            columns = min(size, 4 - at % 4, 4 - to % 4)
            parameter[:, to % 4 : to % 4 + columns].copy_(table[:, at % 4 : at % 4 + columns])
        elif kind == "flat":
            parameter.view(-1).narrow(0, to, size).copy_(given.reshape(-1).narrow(0, at, size))
        elif kind == "turned":
            parameter.t().copy_(held["b"])
        elif kind == "row":
            parameter.view(2, 3, 4)[to % 2][at % 3].copy_(table[at])
        elif kind == "fill":
            parameter[to].fill_(value)
        elif kind == "zero":
            parameter.narrow(0, to, 6 - to).zero_()
        elif kind == "clone":
            kept = table.t().contiguous()
            parameter.copy_(kept.t())
        elif kind == "cat":
            parameter.copy_(torch.cat([table[at:], table[:at]]))
        elif kind == "stack":
            parameter.view(2, 3, 4).copy_(torch.stack([table[:3], held["a"][3:]]))
        else:
            parameter.narrow(0, to, rows).copy_(table.narrow(0, at, rows).to(torch.float64))

    return step


@settings(deadline=None)
@given(st.lists(steps(), max_size=8), st.booleans())
def test_copies_put_elements_where_torch_does(made_of: list[Step], from_zeros: bool) -> None:
    def program(sources: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parameter = torch.zeros(6, 4) if from_zeros else torch.ones(6, 4)
        for step in made_of:
            step({**sources, "parameter": parameter})
        return {"parameter": parameter}

    assert torch.equal(filled(traced(program))["parameter"], program(VALUES)["parameter"])


def test_numbers_are_constants_and_can_be_read_back() -> None:
    def program(sources: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        one, half = torch.tensor(1.0), torch.tensor(0.5)
        many = torch.full((3,), float(half))
        table = torch.full((4,), -1, dtype=torch.int64)
        table[2] = 1
        return {"one": one, "many": many, "row": sources["a"][int(table[2])].clone()}

    found = filled(traced(program))
    assert found["one"].item() == 1.0
    assert found["many"].tolist() == [0.5] * 3
    assert torch.equal(found["row"], VALUES["a"][1])


COMPUTED: dict[str, Step] = {
    "in place": lambda held: held["parameter"].mul_(2),
    "out of place": lambda held: held["parameter"].copy_(held["a"] * 2),
    "many at once": lambda held: torch._foreach_copy_([held["parameter"]], [held["a"]]),
    "into an argument": lambda held: torch.add(held["a"], held["a"], out=held["parameter"]),
    "at random": lambda held: held["parameter"].uniform_(),
}


@pytest.mark.parametrize("how", COMPUTED)
def test_what_is_computed_is_refused_unless_it_is_overwritten(how: str) -> None:
    def program(sources: dict[str, torch.Tensor], *, over: bool) -> dict[str, torch.Tensor]:
        parameter = torch.zeros(6, 4)
        COMPUTED[how]({**sources, "parameter": parameter})
        if over:
            parameter.copy_(sources["a"])
        return {"parameter": parameter}

    with pytest.raises(BadInputError, match="the engine computes values for it"):
        filled(traced(lambda sources: program(sources, over=False)))
    assert torch.equal(filled(traced(lambda sources: program(sources, over=True)))["parameter"], VALUES["a"])


def test_what_is_never_written_is_refused() -> None:
    with pytest.raises(BadInputError, match="does not load all of it"):
        filled(traced(lambda sources: {"parameter": torch.empty(6, 4)}))

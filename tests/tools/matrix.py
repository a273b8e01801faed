"""The family matrix: every family with a plan, built small, resharded, run on several ranks and compared with one
process. On request, transformers' own tensor parallelism runs the same checkpoints."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import families
import torch
from family_inputs import inputs, main_output
from places import WORKERS
from torchrun_tools import on_ranks, torchrun
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

import reshard
from reshard.errors import TopologyError
from reshard.planning.model.rules import expert_rules, wildcard

NEW_TOKENS = 4
TIMEOUT, PER_FAMILY = 90, 10  # seconds after which a job is given up: for its start, and for each family
EXACT = 1e-5  # largest relative error in fp32


@dataclass(frozen=True, slots=True)
class Row:
    """The `step` that a family reached: not built, single (one process cannot run it), refused (this number of ranks,
    for the reason in `detail`), convert, run, or parity.

    `styles` are those of the plan's parameters and modules, `conversions` the operations that its checkpoint may go
    through. `equal_tokens` is None if the model generates no text. `rounding` is looked at if the error is larger than
    `EXACT`: how far the output of one process moves if every weight moves by at most half a unit in its last place.
    `upstream` is the error of transformers' own tensor parallelism, or its last words.
    """

    family: str
    step: str
    detail: str
    styles: tuple[str, ...] = ()
    plan: str = ""  # whose: the model's, corrected, ours (by structure), general; more than one for parts of a model
    conversions: tuple[str, ...] = ()
    error: float | None = None  # largest relative error of the output
    equal_tokens: bool | None = None
    rounding: float | None = None
    upstream: float | str | None = None

    @property
    def ok(self) -> bool:
        return self.error is not None and is_rounding(self.error, self.rounding) and self.equal_tokens is not False


@dataclass(frozen=True, slots=True)
class Alone:
    """What one process did with a family: its checkpoint, what it was given, what it computed, and a remark."""

    source: Path
    inputs: Path
    output: torch.Tensor
    tokens: list[list[int]] | None
    remark: str


@dataclass(frozen=True, slots=True)
class _Job:
    """What one process did, and the row so far."""

    alone: Alone
    row: Row


def walk(
    root: Path,
    tp_size: int,
    ep_size: int = 1,
    model_types: tuple[str, ...] = families.MODEL_TYPES,
    *,
    planned: bool = True,
    upstream: bool = False,
    alone: dict[str, Row | Alone] | None = None,
) -> list[Row]:
    """Return a row for each family with a plan, or with one for experts if `ep_size` is given; for each without a plan,
    unless `planned`. `root` is empty.

    `alone` keeps what one process did, for walks of the same families on other meshes.
    """
    alone = {} if alone is None else alone
    rows: dict[str, Row] = {}
    jobs: dict[str, _Job] = {}
    for family in model_types:
        try:
            model = families.build(family, planned=planned)
        except Exception as error:
            rows[family] = Row(family, "not built", _line(error))
            continue
        if model is None or not (expert_rules(model) if ep_size > 1 else model.tp_plan or not planned):
            continue
        if family not in alone:
            alone[family] = _run_alone(family, model, root)
        prepared = _prepare(family, model, alone[family], root, tp_size if model.tp_plan or not planned else 1, ep_size)
        if isinstance(prepared, Row):
            rows[family] = prepared
        else:
            jobs[family] = prepared
    ranks = max(tp_size, ep_size)
    for family, result in _run_all("parity.py", root, ranks, jobs).items():
        rows[family] = _compare(family, root, result, jobs[family], planned=planned)
    if upstream:
        for family, result in _run_all("upstream.py", root, ranks, jobs).items():
            rows[family] = replace(rows[family], upstream=_upstream(family, root, result, jobs[family]))
    return [rows[family] for family in model_types if family in rows]


def _run_alone(family: str, model: Any, root: Path) -> Row | Alone:
    """Write the family's checkpoint and run it in this process. Return a row if a step fails."""
    source, given = root / f"{family}.source", root / f"{family}.inputs"
    try:
        single = type(model).from_pretrained(families.save(model, source)).eval()
        arguments = inputs(single)
        torch.save(arguments, given)
        with torch.inference_mode():
            output = main_output(single(**arguments))
            again = main_output(single(**arguments))
        if not torch.equal(output, again):
            raise ValueError("its output is another every time")
        if not output.isfinite().all() or not output.any():
            raise ValueError("its output is zero or not finite")
        tokens, remark = _generate(single, arguments)
    except Exception as error:
        return Row(family, "single", _line(error))
    return Alone(source, given, output, tokens, remark)


def _prepare(family: str, model: Any, alone: Row | Alone, root: Path, tp_size: int, ep_size: int) -> Row | _Job:
    """Reshard the family's checkpoint. Return a row if a step fails."""
    if isinstance(alone, Row):
        return alone
    out = root / family
    try:
        planned = reshard.plan(alone.source, tp_size=tp_size, ep_size=ep_size)
        manifest = reshard.convert(alone.source, out, tp_size=tp_size, ep_size=ep_size)
        reshard.verify(out, against=alone.source)
    except TopologyError as error:
        return Row(family, "refused", error.message)
    except Exception as error:
        return Row(family, "convert", _line(error))
    styles = {target.style for target in manifest.parameters if target.style} | set(manifest.hooks.values())
    plan = _whose(planned, has_plan=bool(model.tp_plan))
    return _Job(alone, Row(family, "run", alone.remark, tuple(sorted(styles)), plan, conversions(model)))


def _whose(planned: Any, *, has_plan: bool) -> str:
    """Say whose rules a plan has."""
    added = set(planned.model.added_rules)
    styles = {p.style for p in planned.model.parameters if p.style and {p.name, wildcard(p.name)} & added} | {
        style for name, style in planned.model.hooks.items() if {name, wildcard(name)} & added
    }
    general = {style for style in styles if "gather_output" in style or style.startswith("embedding_")}
    kinds = [
        *(["corrected" if planned.model.corrected_rules else "model's"] if has_plan else []),
        *(["ours"] if styles - general - {"replicate"} else []),
        *(["general"] if styles and styles == general else []),
    ]
    return " + ".join(kinds) or "none"


def conversions(model: Any) -> tuple[str, ...]:
    entries = get_model_conversion_mapping(model)
    return tuple(sorted({type(operation).__name__ for entry in entries for operation in _operations(entry)}))


def _operations(entry: Any) -> list[Any]:
    return entry.operations if isinstance(entry, WeightConverter) else []


def _generate(model: Any, arguments: dict[str, Any]) -> tuple[list[list[int]] | None, str]:
    """Return greedy tokens, or None and the reason why there are none."""
    if not model.can_generate() or "input_ids" not in arguments:
        return None, "no tokens: generates no text"
    arguments = {"attention_mask": torch.ones_like(arguments["input_ids"]), **arguments}
    try:
        return model.generate(**arguments, max_new_tokens=NEW_TOKENS, do_sample=False).tolist(), ""
    except Exception as error:
        return None, f"no tokens: {_line(error)}"


def _run_all(worker: str, root: Path, ranks: int, jobs: dict[str, _Job]) -> dict[str, dict[str, Any]]:
    """Return the worker's result for each job; {"error": its last words} if there is none."""
    found: dict[str, dict[str, Any]] = {}
    while len(found) < len(jobs):
        waiting = {family: job for family, job in jobs.items() if family not in found}
        done, words = _run(worker, root, ranks, waiting)
        found |= done
        if len(done) < len(waiting) and not any("error" in result for result in done.values()):
            # The first family without a result ended the job: continue after it.
            found[next(family for family in waiting if family not in done)] = {"error": words}
    return found


def _run(worker: str, root: Path, ranks: int, waiting: dict[str, _Job]) -> tuple[dict[str, Any], str]:
    """Return the results of one job by family, and its last words if it ended early."""
    entries = [
        {
            "name": family,
            "folder": str(root / family),
            "source": str(job.alone.source),
            "inputs": str(job.alone.inputs),
            "new_tokens": NEW_TOKENS if job.alone.tokens is not None else None,
        }
        for family, job in waiting.items()
    ]
    out = root / f"{worker}.json"
    out.unlink(missing_ok=True)
    (root / "jobs.json").write_text(json.dumps(entries))
    arguments = (str(WORKERS / worker), str(root / "jobs.json"), str(out))
    limit = TIMEOUT + PER_FAMILY * len(waiting)
    # transformers' own tensor parallelism changes what it imports: processes of its own.
    run = torchrun if worker == "upstream.py" else on_ranks
    try:
        lines = run(ranks, *arguments, timeout=limit).stderr.splitlines()
        said = [line for line in lines if "Error: " in line and "ChildFailed" not in line]
        words = said[0][-160:] if said else "ended early"
    except subprocess.TimeoutExpired:
        words = f"no result within {limit} s"
    return json.loads(out.read_text()) if out.exists() else {}, words


def _compare(family: str, root: Path, result: dict[str, Any], job: _Job, *, planned: bool) -> Row:
    if "error" in result:
        return replace(job.row, detail=result["error"])
    equal = None if job.alone.tokens is None else result["tokens"] == job.alone.tokens
    error = _error(root / f"parity.py.json.{family}.pt", job)
    rounding = _rounding(family, job.alone, planned=planned) if EXACT < error < 1000 * EXACT else None
    return replace(job.row, step="parity", error=error, equal_tokens=equal, rounding=rounding)


def _rounding(family: str, alone: Alone, *, planned: bool) -> float:
    """Return the largest error that rounding every weight anew makes in one process."""
    arguments, most = torch.load(alone.inputs), 0.0
    for seed in range(4):
        model = families.build(family, planned=planned)
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode():
            for parameter in model.parameters():
                half = torch.finfo(parameter.dtype).eps / 2
                parameter.mul_(1 + half * (2 * torch.rand(parameter.shape, generator=generator) - 1))
            output = main_output(model(**arguments))
        most = max(most, ((output - alone.output).abs().max() / alone.output.abs().max()).item())
    return most


def is_rounding(error: float, rounding: float | None) -> bool:
    """Whether an error is what fp32 allows: `EXACT`, or twice what rounding the weights anew makes."""
    return error <= max(EXACT, 2 * (rounding or 0.0))


def _upstream(family: str, root: Path, result: dict[str, Any], job: _Job) -> float | str:
    if "error" in result:
        return result["error"]
    error = _error(root / f"upstream.py.json.{family}.pt", job)
    return error if math.isfinite(error) else "an output of another shape, or not finite"


def _error(path: Path, job: _Job) -> float:
    got, expected = torch.load(path)["logits"], job.alone.output
    if got.shape != expected.shape:
        return math.inf
    return ((got - expected).abs().max() / expected.abs().max()).item()


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]

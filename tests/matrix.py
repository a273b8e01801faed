"""The family matrix: every causal family, built small, resharded, run under torchrun and compared with one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import torch

import reshard

WORKER = Path(__file__).parent / "workers" / "parity.py"
IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
NEW_TOKENS = 4
TIMEOUT = 300  # seconds for one torchrun job over all families


@dataclass(frozen=True, slots=True)
class Row:
    """How far a family came: `step` is not built, single (one process cannot run it), convert, run, or parity."""

    family: str
    step: str
    detail: str
    error: float | None = None  # largest relative error of the logits
    equal_tokens: bool | None = None

    @property
    def ok(self) -> bool:
        return self.error is not None and self.error <= 1e-5 and bool(self.equal_tokens)


def walk(root: Path, world_size: int, model_types: tuple[str, ...] = families.MODEL_TYPES) -> list[Row]:
    """One row for each family that has a tp_plan, in order. `root` is an empty folder."""
    rows: dict[str, Row] = {}
    jobs: dict[str, dict[str, Any]] = {}
    for family in model_types:
        try:
            model = families.build(family)
        except Exception as error:
            rows[family] = Row(family, "not built", _line(error))
            continue
        if model is not None:
            _prepare(family, model, root, world_size, rows, jobs)
    waiting = list(jobs)
    while waiting:
        done, words = _run(root, world_size, waiting)
        for family, result in done.items():
            rows[family] = _compare(family, root, result, jobs[family])
        if len(done) < len(waiting):  # the first without a result ended the job: go on behind it
            bad = next(family for family in waiting if family not in done)
            rows[bad] = Row(bad, "run", words)
            done[bad] = {}
        waiting = [family for family in waiting if family not in done]
    return [rows[family] for family in model_types if family in rows]


def _prepare(
    family: str, model: Any, root: Path, world_size: int, rows: dict[str, Row], jobs: dict[str, dict[str, Any]]
) -> None:
    source, out = root / f"{family}.source", root / family
    try:
        single = type(model).from_pretrained(families.save(model, source)).eval()
        with torch.inference_mode():
            logits = single(IDS).logits
        tokens = single.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW_TOKENS, do_sample=False)
    except Exception as error:
        rows[family] = Row(family, "single", _line(error))
        return
    try:
        reshard.convert(source, out, tp_size=world_size)
        reshard.verify(out, against=source)
    except Exception as error:
        rows[family] = Row(family, "convert", _line(error))
        return
    jobs[family] = {"logits": logits, "tokens": tokens.tolist()}


def _run(root: Path, world_size: int, waiting: list[str]) -> tuple[dict[str, Any], str]:
    """Results of the families that one torchrun job came through, and its last words if it ended early."""
    entries = [
        {"name": family, "folder": str(root / family), "ids": IDS.tolist(), "new_tokens": NEW_TOKENS}
        for family in waiting
    ]
    out = root / "out.json"
    out.unlink(missing_ok=True)
    (root / "jobs.json").write_text(json.dumps(entries))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(
            [*command, str(WORKER), str(root / "jobs.json"), str(out)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        said = [line for line in done.stderr.splitlines() if "Error: " in line and "ChildFailed" not in line]
    except subprocess.TimeoutExpired:
        said = [f"no end within {TIMEOUT} s"]
    return json.loads(out.read_text()) if out.exists() else {}, said[0][-160:] if said else "ended early"


def _compare(family: str, root: Path, result: dict[str, Any], expected: dict[str, Any]) -> Row:
    got = torch.load(root / f"out.json.{family}.pt")["logits"]
    scale = expected["logits"].abs().max()
    error = ((got - expected["logits"]).abs().max() / scale).item()
    return Row(family, "parity", "", error, result["tokens"] == expected["tokens"])


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]

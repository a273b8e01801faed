"""The family matrix: every family with a plan, built small, resharded, run under torchrun, compared with one
process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import torch
from family_inputs import inputs, main_output

import reshard

WORKER = Path(__file__).parent / "workers" / "parity.py"
NEW_TOKENS = 4
TIMEOUT = 90  # seconds without a further result after which a torchrun job is given up


@dataclass(frozen=True, slots=True)
class Row:
    """How far a family came: `step` is not built, single (one process cannot run it), convert, run, or parity.

    `styles` are those of the plan's parameters and modules; `equal_tokens` is None where the model generates no text.
    """

    family: str
    world_size: int
    step: str
    detail: str
    styles: tuple[str, ...] = ()
    error: float | None = None  # largest relative error of the output
    equal_tokens: bool | None = None

    @property
    def ok(self) -> bool:
        return self.error is not None and self.error <= 1e-5 and self.equal_tokens is not False


@dataclass(frozen=True, slots=True)
class _Job:
    """What one process computed, and the styles of the plan."""

    output: torch.Tensor
    tokens: list[list[int]] | None
    remark: str
    styles: tuple[str, ...]


def walk(root: Path, world_size: int, model_types: tuple[str, ...] = families.MODEL_TYPES) -> list[Row]:
    """One row for each family that has a plan, in order. `root` is an empty folder."""
    rows: dict[str, Row] = {}
    jobs: dict[str, _Job] = {}
    for family in model_types:
        try:
            model = families.build(family)
        except Exception as error:
            rows[family] = Row(family, world_size, "not built", _line(error))
            continue
        if model is None:
            continue
        prepared = _prepare(family, model, root, world_size)
        if isinstance(prepared, Row):
            rows[family] = prepared
        else:
            jobs[family] = prepared
    waiting = list(jobs)
    while waiting:
        done, words = _run(root, world_size, {family: jobs[family] for family in waiting})
        for family, result in done.items():
            rows[family] = _compare(family, world_size, root, result, jobs[family])
        if len(done) < len(waiting):  # the first without a result ended the job: go on behind it
            bad = next(family for family in waiting if family not in done)
            rows[bad] = Row(bad, world_size, "run", words, jobs[bad].styles)
            done[bad] = {}
        waiting = [family for family in waiting if family not in done]
    return [rows[family] for family in model_types if family in rows]


def _prepare(family: str, model: Any, root: Path, world_size: int) -> Row | _Job:
    """Write the family's checkpoint, run it in this process and reshard it. A row where one of these fails."""
    source, out = root / f"{family}.source", root / family
    try:
        single = type(model).from_pretrained(families.save(model, source)).eval()
        arguments = inputs(single)
        torch.save(arguments, root / f"{family}.inputs")
        with torch.inference_mode():
            output = main_output(single(**arguments))
        if not output.isfinite().all() or not output.any():
            raise ValueError("its output is zero or not finite")
        tokens, remark = _generate(single, arguments)
    except Exception as error:
        return Row(family, world_size, "single", _line(error))
    try:
        manifest = reshard.convert(source, out, tp_size=world_size)
        reshard.verify(out, against=source)
    except Exception as error:
        return Row(family, world_size, "convert", _line(error))
    styles = {target.style for target in manifest.parameters if target.style} | set(manifest.hooks.values())
    return _Job(output, tokens, remark, tuple(sorted(styles)))


def _generate(model: Any, arguments: dict[str, Any]) -> tuple[list[list[int]] | None, str]:
    """Greedy tokens, or None and why there are none."""
    if not model.can_generate() or "input_ids" not in arguments:
        return None, "no tokens: generates no text"
    arguments = {"attention_mask": torch.ones_like(arguments["input_ids"]), **arguments}
    try:
        return model.generate(**arguments, max_new_tokens=NEW_TOKENS, do_sample=False).tolist(), ""
    except Exception as error:
        return None, f"no tokens: {_line(error)}"


def _run(root: Path, world_size: int, waiting: dict[str, _Job]) -> tuple[dict[str, Any], str]:
    """Results of the families that one torchrun job came through, and its last words if it ended early."""
    entries = [
        {
            "name": family,
            "folder": str(root / family),
            "inputs": str(root / f"{family}.inputs"),
            "new_tokens": NEW_TOKENS if job.tokens is not None else None,
        }
        for family, job in waiting.items()
    ]
    out, log = root / "out.json", root / "out.log"
    out.unlink(missing_ok=True)
    (root / "jobs.json").write_text(json.dumps(entries))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*command, str(WORKER), str(root / "jobs.json"), str(out)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,  # so that its ranks can be ended with it
        )
        in_time = _wait(process, out)
    lines = log.read_text(errors="replace").splitlines()
    said = [line for line in lines if "Error: " in line and "ChildFailed" not in line] if in_time else []
    words = said[0][-160:] if said else "ended early" if in_time else f"no result within {TIMEOUT} s"
    return json.loads(out.read_text()) if out.exists() else {}, words


def _wait(process: subprocess.Popen[bytes], out: Path) -> bool:
    """Wait for the job's end; False where it is ended here, because results stopped coming."""
    last, seen = time.monotonic(), 0.0
    while process.poll() is None:
        time.sleep(0.1)
        written = out.stat().st_mtime if out.exists() else 0.0
        if written != seen:
            last, seen = time.monotonic(), written
        if time.monotonic() - last > TIMEOUT:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
    return True


def _compare(family: str, world_size: int, root: Path, result: dict[str, Any], job: _Job) -> Row:
    got = torch.load(root / f"out.json.{family}.pt")["logits"]
    error = ((got - job.output).abs().max() / job.output.abs().max()).item()
    equal = None if job.tokens is None else result["tokens"] == job.tokens
    return Row(family, world_size, "parity", job.remark, job.styles, error, equal)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]

"""The runtime on a device: on CPU always, on GPUs if there are any (`-m cuda`, or scripts/gpu_check)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from device_check import CASES, Case
from torchrun_tools import torchrun

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


def marks(gpus: int) -> list[pytest.MarkDecorator]:
    reason = f"needs {gpus} GPU{'s' * (gpus > 1)}, and this machine has {GPUS}"
    return [pytest.mark.cuda, pytest.mark.skipif(gpus > GPUS, reason=reason)] if gpus else []


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=marks(case.gpus)) for case in CASES])
def test_on_a_device(case: Case, tmp_path: Path) -> None:
    done = torchrun(case.ranks, *case.prepare(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["device"] == {"cpu": "cpu"}.get(case.device, "cuda:0")
    assert found["bench"]["ranks"] == case.ranks
    for name in ("error", "compiled", "flash", "memory"):
        assert f"  {name}: " in done.stdout

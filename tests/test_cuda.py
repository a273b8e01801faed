"""What the runtime does on a device: on CPU always, on GPUs where there are any (`-m cuda`, or scripts/gpu_check)."""

from __future__ import annotations

import json
from pathlib import Path

import pico
import pytest
import torch
from torchrun_tools import WORKERS, torchrun

import reshard

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpus(count: int) -> list[pytest.MarkDecorator]:
    reason = f"needs {count} GPU{'s' * (count > 1)}, and this machine has {GPUS}"
    return [pytest.mark.cuda, pytest.mark.skipif(count > GPUS, reason=reason)]


@pytest.mark.parametrize(
    ("device", "ranks", "backend"),
    [
        pytest.param("cpu", 2, "gloo", id="cpu"),
        pytest.param("cuda", 1, "nccl", id="one GPU, one rank", marks=gpus(1)),
        pytest.param("cuda:0", 2, "gloo", id="one GPU, two ranks", marks=gpus(1)),
        pytest.param("cuda:0", 4, "gloo", id="one GPU, four ranks", marks=gpus(1)),
        pytest.param("cuda", 2, "nccl", id="two GPUs", marks=gpus(2)),
        pytest.param("cuda", 4, "nccl", id="four GPUs", marks=gpus(4)),
    ],
)
def test_on_a_device(device: str, ranks: int, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = pico.save("qwen3", tmp_path / "source")  # heads of 8 numbers, which flash kernels take
    reshard.convert(source, tmp_path / "fp32", tp_size=ranks, sync=False, reference_logits=True)
    reshard.convert(source, tmp_path / "bf16", tp_size=ranks, sync=False, dtype="bfloat16")
    job = {"device": device, "backend": backend, "compiler": "aot_eager" if device == "cpu" else "inductor"}
    job |= {name: str(tmp_path / name) for name in ("source", "fp32", "bf16")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = torchrun(ranks, str(WORKERS / "on_device.py"), str(tmp_path / "job.json"), str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["device"] == {"cpu": "cpu"}.get(device, "cuda:0")
    assert found["bench"]["ranks"] == ranks
    with capsys.disabled():
        figures = {name: found[name] for name in ("error", "compiled", "flash", "memory")}
        if device != "cpu":
            print(f"\n{found['bench']['device']}, {ranks} ranks over {backend}: {figures}")

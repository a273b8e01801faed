"""What tests of exports share: small checkpoints, the environment that has the engine, and what it does by itself.

`python tests/tools/engine_tools.py` records the copy plans that are checked in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pico
from places import DATA, ROOT, WORKERS

import reshard

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
HERE = PYTHON.exists()
PLANS = DATA / "copy-plans"
ALONE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
_HEADS = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
_EXPERTS = {**_HEADS, "intermediate_size": 96, "moe_intermediate_size": 64}
PAGE = "make_pico-tp2"  # the checkpoint that the pages' commands are run on
# Recorded plans: name → family, its options, and those of the export.
RECORDED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    PAGE: ("", {}, {"tp_size": 2}),
    "llama-tp2": ("llama", {**_HEADS, "intermediate_size": 96}, {"tp_size": 2}),
    "llama-tp4-pp2": ("llama", {**_HEADS, "intermediate_size": 96}, {"tp_size": 4, "pipeline_size": 2}),
    "qwen3_moe-tp2": ("qwen3_moe", _EXPERTS, {"tp_size": 2}),
    "qwen3_moe-ep2": ("qwen3_moe", _EXPERTS, {"tp_size": 2, "ep": True}),
}


def checkpoint(name: str, folder: Path) -> Path:
    """Write the checkpoint that a recorded plan is for."""
    family, options, _ = RECORDED[name]
    if name == PAGE:
        subprocess.run([sys.executable, str(ROOT / "scripts" / "make_pico.py"), str(folder)], check=True)
        return folder
    return pico.save(family, folder, **options)


def plan_of(name: str) -> Path:
    return PLANS / f"{name}.gz"


def run_worker(worker: str, *arguments: str, timeout: float = 300) -> str:
    """Run a worker by the engine's Python, and return what it printed."""
    environment = {**os.environ, **ALONE}
    command = [str(PYTHON), "-P", str(WORKERS / worker), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def save_by_vllm(jobs: Iterable[dict[str, Any]], tp: int, pp: int = 1) -> None:
    """Have vLLM's own saver write what its model holds after loading: jobs as for `vllm_saver`."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(list(jobs)))
        file.flush()
        run_worker("vllm_saver.py", file.name, str(tp), str(pp))


def record() -> None:
    PLANS.mkdir(exist_ok=True)
    for name, (_, _, options) in RECORDED.items():
        with tempfile.TemporaryDirectory() as folder:
            source, out = checkpoint(name, Path(folder) / "source"), Path(folder) / "out"
            reshard.export(source, out, engine_python=PYTHON, dtype="float32", **options)
            plan_of(name).write_bytes((out / "reshard.copy-plan.gz").read_bytes())


if __name__ == "__main__":
    record()
